//! What was appended is read back bit for bit, whoever wrote it and in whatever order.

mod journals;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use journals::{
    Model, Records, append, block, contents, create, folder_of, journal, key, model, open,
};
use logratio::{
    Error,
    cache::{Cache, ValueKind},
    content_key::Key,
};
use proptest::{collection::vec, prelude::*};
use tempfile::{TempDir, tempdir};

fn some_records() -> impl Strategy<Value = Records> {
    let values = vec(-1e4f32..=0.0, 1..6);
    vec(
        (0..40u64, values).prop_map(|(number, values)| (key(number), values)),
        0..6,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))] // every block waits for the disk

    /// Several writers, several blocks: equal to a map in memory, where the first value of a key
    /// wins and a contradiction is an error.
    #[test]
    fn agrees_with_a_map(writers in vec(vec(some_records(), 0..4), 0..4)) {
        let folder = tempdir().expect("folder");
        let mut expected = Model::new();
        let (mut records, mut tokens) = (0, 0);
        for blocks in &writers {
            let mut writer = create(folder.path());
            for block in blocks {
                let new: Records = block
                    .iter()
                    .map(|(key, values)| (*key, expected.entry(*key).or_insert(values.clone()).clone()))
                    .collect();
                append(&mut writer, &new).expect("appends");
                records += new.len();
                tokens += new.iter().map(|(_, values)| values.len() as u64).sum::<u64>();
            }
        }
        let reader = open(folder.path()).expect("opens");
        prop_assert_eq!(reader.len(), records);
        prop_assert_eq!(reader.distinct().expect("agrees") as usize, expected.len());
        prop_assert_eq!(reader.torn_bytes(), 0);
        prop_assert_eq!(reader.tokens(), tokens);
        prop_assert_eq!(contents(&reader, (0..40).map(key)), expected);
    }
}

#[test]
fn rows_are_read_in_the_order_asked_for() {
    let (bytes, _) = journal(3);
    let folder = folder_of(&[&bytes]);
    let reader = open(folder.path()).expect("opens");
    let keys = [key(4), key(99), key(0), key(4)];
    let rows = reader.join(&keys).expect("joins");
    assert_eq!(rows[1], -1);
    assert_eq!(rows[0], rows[3]);
    let (offsets, values) = reader.read(&[rows[0], rows[2]]).expect("reads");
    let expected = [model(3)[&key(4)].clone(), model(3)[&key(0)].clone()];
    assert_eq!(offsets, [0, expected[0].len() as i64, values.len() as i64]);
    assert_eq!(values, expected.concat());
    for row in [-1, 6] {
        assert!(matches!(
            reader.read(&[0, row]),
            Err(Error::OutOfRange { .. })
        ));
    }
}

fn two_journals(one: &[f32], other: &[f32]) -> TempDir {
    let folder = tempdir().expect("folder");
    for values in [one, other] {
        append(&mut create(folder.path()), &[(key(1), values.to_vec())]).expect("appends");
    }
    folder
}

#[test]
fn the_first_of_two_close_records_is_kept() {
    let folder = two_journals(&[-1.0, -2.0], &[-1.0005, -2.0]);
    let reader = open(folder.path()).expect("opens");
    let mut paths: Vec<PathBuf> = fs::read_dir(folder.path())
        .expect("lists")
        .map(|entry| entry.expect("lists").path())
        .collect();
    paths.sort();
    let alone = tempdir().expect("folder");
    fs::copy(&paths[0], alone.path().join("0.journal")).expect("copies");
    let first = open(alone.path()).expect("opens");
    assert_eq!((reader.len(), reader.distinct().expect("agrees")), (2, 1));
    let row = reader.join(&[key(1)]).expect("joins");
    assert_eq!(
        reader.read(&row).expect("reads"),
        first.read(&[0]).expect("reads")
    );
}

#[test]
fn records_that_contradict_each_other_name_both_journals() {
    for other in [&[-1.0, -2.002][..], &[-1.0]] {
        let folder = two_journals(&[-1.0, -2.0], other);
        let reader = open(folder.path()).expect("opens");
        let joined = reader.join(&[key(1)]).expect_err("contradiction");
        let walked = reader.distinct().expect_err("contradiction");
        for error in [joined.to_string(), walked.to_string()] {
            assert_eq!(error.matches(".journal").count(), 2, "{error}");
        }
    }
}

#[test]
fn a_journal_that_contradicts_itself_is_refused_by_a_join() {
    let folder = tempdir().expect("folder");
    let mut writer = create(folder.path());
    for value in [-1.0, -1.5] {
        append(&mut writer, &[(key(1), vec![value])]).expect("appends");
    }
    let reader = open(folder.path()).expect("opens");
    let error = reader.join(&[key(1)]).expect_err("contradiction");
    assert!(error.to_string().contains("contradicts"), "{error}");
}

#[test]
fn caches_of_another_reference_or_kind_are_not_merged() {
    let folder = tempdir().expect("folder");
    let cache = |name: &str, byte| Cache::new(folder.path().join(name), [byte; 32]);
    let into = cache("into", 7);
    let others = [
        cache("other", 8),
        cache("sums", 7).with_kind(ValueKind::Sums),
    ];
    for other in others {
        let refused = into.merge(&[other]).expect_err("not alike");
        assert!(matches!(refused, Error::Invalid(_)), "{refused:?}");
    }
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let folder = tempdir().expect("folder");
    let mut writer = create(folder.path());
    let mut refused = |keys: &[Key], offsets: &[i64], values: &[f32]| {
        matches!(writer.append(keys, offsets, values), Err(Error::Invalid(_)))
    };
    assert!(refused(&[key(1)], &[0], &[]));
    assert!(refused(&[], &[], &[]));
    assert!(refused(&[key(1)], &[0, 2], &[-1.0]));
    assert!(refused(&[key(1)], &[1, 1], &[-1.0]));
    assert!(refused(&[key(1), key(2)], &[0, 0, 1], &[-1.0]));
    assert!(refused(&[key(1), key(2)], &[0, 2, 1], &[-1.0]));
    assert!(refused(
        &[key(1), key(2), key(3)],
        &[0, i64::MIN, i64::MAX, 1],
        &[-1.0]
    ));
    writer
        .append(&[], &[0], &[])
        .expect("no record is no block");
}

#[test]
fn a_journal_without_a_block_goes_with_its_writer() {
    let folder = tempdir().expect("folder");
    let writer = create(&folder.path().join("made/on/the/way"));
    let path = writer.path().to_owned();
    assert!(
        open(path.parent().expect("folder"))
            .expect("opens")
            .is_empty()
    );
    drop(writer);
    assert!(!path.exists());
}

#[test]
fn a_missing_folder_is_the_systems_error() {
    let error = open(Path::new("/no/such/cache")).expect_err("missing");
    assert!(matches!(error, Error::Io { .. }));
    assert!(error.to_string().starts_with("/no/such/cache: "), "{error}");
}

#[test]
fn a_living_journal_is_locked_and_can_be_read() {
    let folder = tempdir().expect("folder");
    let mut writer = create(folder.path());
    append(&mut writer, &block(0)).expect("appends");
    let file = fs::File::open(writer.path()).expect("opens");
    assert!(file.try_lock().is_err());
    assert_eq!(open(folder.path()).expect("opens").len(), 2);
    drop(writer);
    file.try_lock().expect("free");
}

/// Readers see only whole blocks while a writer appends, and never report growth as damage.
#[test]
fn readers_beside_a_writer_see_whole_blocks() {
    let folder = tempdir().expect("folder");
    let mut writer = create(folder.path());
    let read = || {
        let mut seen = 0;
        while seen < 200 {
            let reader = open(folder.path()).expect("a snapshot");
            assert!(reader.len() >= seen);
            seen = reader.len();
            assert_eq!(contents(&reader, (0..200).map(key)), model(seen as u64 / 2));
        }
    };
    thread::scope(|scope| {
        scope.spawn(read);
        for number in 0..100 {
            append(&mut writer, &block(number)).expect("appends");
        }
    });
}
