//! What goes into a store comes out, and nothing else does.

mod sample;

use std::{fs, os::unix::fs::FileExt, path::Path};

use logratio::{
    Error,
    fingerprint::content_key,
    layout::{Batch, Options},
    plan::{self, Layout, Order, Request},
    store::{Store, StoreWriter},
};
use proptest::prelude::*;
use sample::{Completion, Sample, fill, fixed, samples, store};

const HEADER: usize = 64;
const FOOTER: usize = 80;

fn assert_holds(store: &Store, samples: &[Sample]) {
    assert_eq!(store.len(), samples.len());
    for (number, (group, sample)) in store.groups().zip(samples).enumerate() {
        assert_eq!(group.prompt(), sample.prompt);
        assert_eq!(store.files()[number], number as u32 % 3);
        assert_eq!(store.lines()[number], number as u64 + 1);
        let found: Vec<_> = group
            .completions()
            .map(|completion| {
                (
                    completion.ids.to_vec(),
                    completion.mask.to_vec(),
                    completion.role,
                )
            })
            .collect();
        let expected: Vec<_> = sample
            .completions
            .iter()
            .map(|completion| (completion.ids(), completion.mask(), completion.role))
            .collect();
        assert_eq!(found, expected);
    }
}

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
        prop_assert_eq!(store.shared_lengths().iter().sum::<u32>() as usize, store.tokens());
        prop_assert_eq!(store.prompt_lengths(), prompts);
        prop_assert_eq!(store.completion_lengths(), lengths);
        prop_assert_eq!(store.counted_lengths(), counted);
    }

    #[test]
    fn keys_are_the_content_keys_of_prompt_and_completion(samples in samples(8)) {
        let expected: Vec<_> = samples
            .iter()
            .flat_map(|sample| sample.completions.iter().map(|one| (&sample.prompt, one.ids())))
            .map(|(prompt, ids)| content_key(&[&prompt[..], &ids].concat(), prompt.len()))
            .map(|key| key.expect("has both parts"))
            .collect();
        prop_assert_eq!(store(&samples).keys(), expected);
    }

    /// Even where the checksums were made to match, as no accident can: nothing leaves its column.
    #[test]
    fn survives_a_forged_file(at in 0usize..10_000, value: u8, seed in 1usize..6) {
        let folder = tempfile::tempdir().expect("folder");
        let mut bytes = sealed_bytes(folder.path(), seed);
        let length = bytes.len();
        bytes[at % length] = value;
        sign(&mut bytes[..HEADER]);
        sign(&mut bytes[length - FOOTER..]);
        if let Ok(store) = reopen(folder.path(), &bytes) {
            touch(&store);
        }
    }
}

fn sign(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

fn sealed_bytes(folder: &Path, groups: usize) -> Vec<u8> {
    let path = folder.join("groups.store");
    fill(StoreWriter::create(&path).expect("creates"), &fixed(groups));
    fs::read(path).expect("reads")
}

/// Opens a copy, whose file is written anew: cutting a file short in place is slow on ext4.
fn reopen(folder: &Path, bytes: &[u8]) -> logratio::Result<Store> {
    let path = folder.join("copy.store");
    let _ = fs::remove_file(&path);
    fs::write(&path, bytes).expect("writes");
    Store::open(&path)
}

/// Reads everything that a store can be asked for.
fn touch(store: &Store) {
    let all: Vec<i64> = (0..store.len() as i64).collect();
    let request = Request::new(Order::LengthGrouped, 2, 64);
    plan::plan(&store.shapes(), &request).expect("plans");
    for layout in [Layout::Shared, Layout::Padded] {
        let batch = Batch::new(store, &all, Options::new(layout)).expect("in range");
        let mut arena = vec![0i64; batch.table().bytes() / 8];
        batch
            .fill(bytemuck::cast_slice_mut(&mut arena))
            .expect("room enough");
    }
    store.keys();
    store.counted_lengths();
    assert!(store.metadata().len() < 100);
}

fn is_corrupt(result: logratio::Result<Store>) -> bool {
    match result {
        Ok(_) => false,
        Err(Error::CorruptStore { .. }) => true,
        Err(error) => panic!("not a corrupt store, but: {error}"),
    }
}

#[test]
fn every_flipped_bit_is_found_or_harmless() {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = sealed_bytes(folder.path(), 2);
    let path = folder.path().join("groups.store");
    let file = fs::File::options().write(true).open(&path).expect("opens");
    for bit in 0..bytes.len() * 8 {
        let (byte, at) = (bytes[bit / 8], bit as u64 / 8);
        file.write_all_at(&[byte ^ 1 << (bit % 8)], at)
            .expect("flips");
        if let Ok(store) = Store::open(&path) {
            touch(&store);
            let unnoticed = store.verify().is_ok();
            assert!(
                !unnoticed || byte == 0,
                "bit {bit} is in no gap between columns"
            );
            if unnoticed {
                assert_holds(&store, &fixed(2));
            }
        }
        file.write_all_at(&[byte], at).expect("flips back");
    }
}

#[test]
fn every_cut_and_every_addition_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let mut bytes = sealed_bytes(folder.path(), 4);
    for length in 0..bytes.len() {
        assert!(
            is_corrupt(reopen(folder.path(), &bytes[..length])),
            "cut to {length}"
        );
    }
    bytes.push(0);
    assert!(is_corrupt(reopen(folder.path(), &bytes)));
}

#[test]
fn a_foreign_file_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = sealed_bytes(folder.path(), 2);
    let changed = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = bytes.clone();
        change(&mut bytes[..HEADER]);
        sign(&mut bytes[..HEADER]);
        reopen(folder.path(), &bytes)
            .expect_err("foreign")
            .to_string()
    };
    assert!(changed(&|header| header[0] = b'X').contains("LRSTORE1"));
    assert!(changed(&|header| header[8] = 2).contains("version 2"));
    assert!(changed(&|header| header[12..16].reverse()).contains("big-endian"));
    assert!(changed(&|header| header[48] ^= 1).contains("bytes"));
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
        "44a16213bdbc8c99e664d366517fcaec710608dc547f837f532590e6b7aab96e"
    );
}

#[test]
fn keeps_the_metadata() {
    let store = StoreWriter::in_memory()
        .finish("{\"files\": [\"ä.jsonl\"]}")
        .expect("seals");
    assert_eq!(store.metadata(), "{\"files\": [\"ä.jsonl\"]}");
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
    fs::write(folder.path().join("groups.store.partial"), vec![1; 100_000]).expect("writes");
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
