//! What goes into a store comes out, and nothing else does.

mod sample;

use std::{fs, path::Path};

use logratio::{
    Error,
    content_key::content_key,
    store::{Store, StoreWriter},
};
use proptest::prelude::*;
use sample::{Completion, Sample, assert_holds, fill, fixed, samples, store};

proptest! {
    #[test]
    fn gives_back_every_group(samples in samples(20)) {
        let store = store(&samples);
        store.verify().expect("whole");
        assert_holds(&store, &samples);
    }

    #[test]
    fn counts_what_it_holds(samples in samples(20)) {
        let store = store(&samples);
        let completions: Vec<&Completion> =
            samples.iter().flat_map(|sample| &sample.completions).collect();
        let lengths: Vec<u32> = completions.iter().map(|one| one.tokens.len() as u32).collect();
        let counted: Vec<u32> = completions
            .iter()
            .map(|one| one.mask().iter().map(|&value| u32::from(value)).sum())
            .collect();
        let prompts: Vec<u32> = samples.iter().map(|one| one.prompt.len() as u32).collect();
        prop_assert_eq!(store.completions(), completions.len());
        prop_assert_eq!(store.tokens(), (prompts.iter().sum::<u32>() + lengths.iter().sum::<u32>()) as usize);
        prop_assert_eq!(store.shared_lengths().expect("whole").iter().sum::<u32>() as usize, store.tokens());
        prop_assert_eq!(store.prompt_lengths().expect("whole"), prompts);
        prop_assert_eq!(store.completion_lengths().expect("whole"), lengths);
        prop_assert_eq!(store.counted_lengths().expect("whole"), counted);
    }

    #[test]
    fn keys_are_the_content_keys_of_prompt_and_completion(samples in samples(8)) {
        let expected: Vec<_> = samples
            .iter()
            .flat_map(|sample| sample.completions.iter().map(|one| (&sample.prompt, one.ids())))
            .map(|(prompt, ids)| content_key(&[&prompt[..], &ids].concat(), prompt.len()))
            .map(|key| key.expect("has both parts"))
            .collect();
        prop_assert_eq!(store(&samples).keys().expect("whole"), expected);
    }
}

#[test]
fn memory_and_disk_hold_the_same() {
    let folder = tempfile::tempdir().expect("folder");
    let samples = fixed(50);
    let disk = fill(
        StoreWriter::create(&folder.path().join("a")).expect("creates"),
        &samples,
    );
    let memory = store(&samples);
    assert_eq!(disk.digest(), memory.digest());
    assert_ne!(disk.digest(), store(&fixed(49)).digest());
    assert_holds(&disk, &samples);
    disk.verify().expect("whole");
}

/// Columns larger than a spool's buffer arrive whole and in order.
#[test]
fn streams_more_than_it_buffers() {
    let folder = tempfile::tempdir().expect("folder");
    let sample = Sample {
        prompt: (0..300_000).collect(),
        completions: vec![Completion {
            tokens: (0..300_000).map(|id| (id, 1)).collect(),
            role: 0,
            values: [0.5, f32::NAN, -1.0, 2.0],
        }],
    };
    let samples = vec![sample; 2];
    let store = fill(
        StoreWriter::create(&folder.path().join("a")).expect("creates"),
        &samples,
    );
    store.verify().expect("whole");
    assert_holds(&store, &samples);
}

/// Caches outlive a release: the key is what `content_key` documents, byte by byte.
#[test]
fn the_key_is_golden() {
    let start = [2, 0, 0, 0, 0, 0, 0, 0];
    let ids = [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 1, 0, 0];
    let hash = blake3::hash(&[&b"logratio.key.v1\0"[..], &start, &ids].concat());
    let key = content_key(&[1, 2, 3, 256], 2).expect("has both parts");
    assert_eq!(key, *hash.as_bytes());
    assert_eq!(
        hash.to_string(),
        "0be90e6f08e306749f4cfe6b02ec2723f8525b3c0a12b7f56b6da9ac92a0915a"
    );
    assert!(content_key(&[1, 2], 0).is_err());
    assert!(content_key(&[1, 2], 2).is_err());
}

/// Runs are compared by their data's digest: it changes only with a new format version.
#[test]
fn the_digest_is_golden() {
    let store = store(&fixed(5));
    let digest = blake3::Hash::from_bytes(store.digest()).to_string();
    assert_eq!(
        digest,
        "abcfaac0496d84156a2015dca83604c5b743785b899c9d30575cb33d400f9942"
    );
}

#[test]
fn a_mask_that_numbers_weights_counts_the_same_tokens() {
    let (plain, mut samples) = (store(&fixed(5)), fixed(5));
    for sample in &mut samples {
        for one in &mut sample.completions {
            one.tokens.iter_mut().for_each(|(_, value)| *value *= 7);
        }
    }
    let weighted = store(&samples);
    weighted.verify().expect("whole");
    assert!(weighted.is_weighted() && !plain.is_weighted());
    assert_ne!(weighted.digest(), plain.digest());
    assert_eq!(
        weighted.counted_lengths().expect("whole"),
        plain.counted_lengths().expect("whole")
    );
    assert_eq!(
        weighted.sum_keys().expect("whole"),
        plain.sum_keys().expect("whole")
    );
    let backwards: Vec<i64> = (0..plain.completions() as i64).rev().collect();
    let mask = plain.mask(&backwards).expect("whole");
    let sevenfold: Vec<u8> = mask.iter().map(|value| 7 * value).collect();
    assert_eq!(weighted.mask(&backwards).expect("whole"), sevenfold);
    assert!(weighted.mask(&[10_000]).is_err());
}

#[test]
fn keeps_the_metadata() {
    let store = StoreWriter::in_memory()
        .finish("{\"files\": [\"ä.jsonl\"]}")
        .expect("seals");
    assert_eq!(
        store.metadata().expect("whole"),
        "{\"files\": [\"ä.jsonl\"]}"
    );
    assert!(store.is_empty());
}

#[test]
fn an_unfinished_writer_leaves_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    drop(StoreWriter::create(&path).expect("creates"));
    assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 0);
}

#[test]
fn what_a_dead_writer_left_is_replaced() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    let left = folder.path().join("groups.store.partial");
    fs::create_dir(&left).expect("creates");
    for name in [
        "lock",
        "tokens",
        "lines",
        "repeats",
        "progress",
        "progress.new",
    ] {
        fs::write(left.join(name), vec![1; 100_000]).expect("writes");
    }
    let store = fill(StoreWriter::create(&path).expect("creates"), &fixed(3));
    assert_holds(&store, &fixed(3));
    assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 1);
}

#[test]
fn a_second_writer_of_one_path_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    let first = StoreWriter::create(&path).expect("creates");
    let error = StoreWriter::create(&path).expect_err("taken");
    assert!(error.to_string().contains("another writer"), "{error}");
    assert_holds(&fill(first, &fixed(3)), &fixed(3));
}

#[test]
fn a_missing_folder_is_the_systems_error_with_the_path() {
    let error = StoreWriter::create(Path::new("/no/such/folder/a")).expect_err("missing");
    assert!(
        error.to_string().starts_with("/no/such/folder/a.partial: "),
        "{error}"
    );
    assert!(std::error::Error::source(&error).is_some());
    let error = Store::open(Path::new("/no/such/store")).expect_err("missing");
    assert!(matches!(error, Error::Io { .. }));
}

#[test]
fn a_group_out_of_range_is_an_error() {
    let store = store(&fixed(3));
    for index in [-1, 3, i64::MAX] {
        let error = store.group(index).expect_err("out of range");
        assert!(error.to_string().contains("there are 3"), "{error}");
    }
}
