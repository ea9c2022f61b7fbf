//! Journals as tests write them, and what must be read back.
#![allow(dead_code)] // each test crate uses its part
#![allow(clippy::cast_precision_loss)] // values are made from small numbers

use std::{collections::BTreeMap, fs, path::Path};

use logratio::{
    Error,
    cache::{CacheReader, CacheWriter},
    content_key::Key,
};
use tempfile::{TempDir, tempdir};

pub const FINGERPRINT: [u8; 32] = [7; 32];
pub const HEADER: usize = 64;

pub type Records = Vec<(Key, Vec<f32>)>;
pub type Model = BTreeMap<Key, Vec<f32>>;

pub fn create(folder: &Path) -> CacheWriter {
    CacheWriter::create(folder, &FINGERPRINT).expect("creates")
}

pub fn open(folder: &Path) -> logratio::Result<CacheReader> {
    CacheReader::open(folder, &FINGERPRINT)
}

pub fn append(writer: &mut CacheWriter, records: &[(Key, Vec<f32>)]) -> logratio::Result<()> {
    let keys: Vec<Key> = records.iter().map(|(key, _)| *key).collect();
    let mut offsets = vec![0];
    for (_, values) in records {
        offsets.push(offsets[offsets.len() - 1] + values.len() as i64);
    }
    let values: Vec<f32> = records
        .iter()
        .flat_map(|(_, values)| values.clone())
        .collect();
    writer.append(&keys, &offsets, &values)
}

/// Everything a reader holds, by key.
pub fn contents(reader: &CacheReader, keys: impl IntoIterator<Item = Key>) -> Model {
    let read = |key| {
        let row = reader.join(&[key]).expect("joins")[0];
        (row >= 0).then(|| (key, reader.read(&[row]).expect("reads").1))
    };
    let found: Model = keys.into_iter().filter_map(read).collect();
    let distinct = reader.distinct().expect("agrees") as usize;
    assert_eq!(found.len(), distinct, "a key that nobody wrote");
    found
}

pub fn key(number: u64) -> Key {
    *blake3::hash(&number.to_le_bytes()).as_bytes()
}

/// Block `number` of a journal: two records, whose values follow from their keys' numbers.
pub fn block(number: u64) -> Records {
    let record = |number: u64| {
        let values = (0..=number % 3).map(|at| -0.25 * ((number + at) % 4096) as f32);
        (key(number), values.collect())
    };
    vec![record(2 * number), record(2 * number + 1)]
}

/// A journal of `blocks` blocks: its bytes, and where each block ends.
pub fn journal(blocks: u64) -> (Vec<u8>, Vec<usize>) {
    let folder = tempdir().expect("folder");
    let mut writer = create(folder.path());
    let ends = (0..blocks).map(|number| {
        append(&mut writer, &block(number)).expect("appends");
        fs::metadata(writer.path()).expect("exists").len() as usize
    });
    let ends = ends.collect();
    (fs::read(writer.path()).expect("reads"), ends)
}

pub fn folder_of(journals: &[&[u8]]) -> TempDir {
    let folder = tempdir().expect("folder");
    for (number, bytes) in journals.iter().enumerate() {
        fs::write(folder.path().join(format!("{number}.journal")), bytes).expect("writes");
    }
    folder
}

pub fn model(blocks: u64) -> Model {
    (0..blocks).flat_map(block).collect()
}

pub fn open_bytes(bytes: &[u8]) -> logratio::Result<CacheReader> {
    open(folder_of(&[bytes]).path())
}

pub fn assert_corrupt(result: logratio::Result<CacheReader>, reason: &str) {
    let error = result.expect_err("damaged");
    assert!(matches!(error, Error::CorruptCache { .. }), "{error:?}");
    assert!(error.to_string().contains(reason), "{error}");
}
