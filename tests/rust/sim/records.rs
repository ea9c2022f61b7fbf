//! Records whose keys and values follow from their numbers.
#![allow(clippy::cast_precision_loss)] // values are made from small numbers

use std::sync::OnceLock;

use logratio::{
    Result,
    cache::{CacheReader, CacheWriter, ValueKind},
    content_key::Key,
};

const NUMBERS: usize = 1 << 13;

/// The keys of all records.
pub fn keys() -> &'static [Key] {
    static KEYS: OnceLock<Vec<Key>> = OnceLock::new();
    let hash = |number: u64| *blake3::hash(&number.to_le_bytes()).as_bytes();
    KEYS.get_or_init(|| (0..NUMBERS as u64).map(hash).collect())
}

/// The key of record `number`.
pub fn key(number: usize) -> Key {
    keys()[number]
}

/// The log-probs of record `number`.
pub fn logps(number: usize) -> impl ExactSizeIterator<Item = f32> {
    let value = move |at| -0.25 * ((7 * number + at) % 4096) as f32;
    let tokens = number % 5 + 1;
    (0..tokens).map(value)
}

pub fn sum(number: usize) -> f64 {
    logps(number).map(f64::from).sum()
}

pub fn append(writer: &mut CacheWriter, kind: ValueKind, numbers: &[usize]) -> Result<()> {
    let keys: Vec<Key> = numbers.iter().copied().map(key).collect();
    let all = || numbers.iter().copied();
    match kind {
        ValueKind::PerToken => {
            let values: Vec<f32> = all().flat_map(logps).collect();
            let mut offsets = vec![0];
            for number in all() {
                offsets.push(offsets[offsets.len() - 1] + logps(number).len() as i64);
            }
            writer.append(&keys, &offsets, &values)
        }
        ValueKind::Sums => {
            let tokens: Vec<u32> = all().map(|number| logps(number).len() as u32).collect();
            let sums: Vec<f64> = all().map(sum).collect();
            writer.append_sums(&keys, &tokens, &sums)
        }
    }
}

/// Asserts that each row holds its record.
pub fn assert_values(reader: &CacheReader, numbers: &[usize], rows: &[i64]) {
    let all = || numbers.iter().copied();
    match reader.kind() {
        ValueKind::PerToken => {
            let (offsets, values) = reader.read(rows).expect("reads");
            assert!(all().flat_map(logps).eq(values), "a wrong value");
            let lengths = offsets
                .windows(2)
                .map(|pair| pair[1].abs_diff(pair[0]) as usize);
            assert!(
                all().map(|number| logps(number).len()).eq(lengths),
                "a wrong length"
            );
        }
        ValueKind::Sums => {
            let (tokens, sums) = reader.read_sums(rows).expect("reads");
            assert!(all().map(sum).eq(sums), "a wrong value");
            assert!(all().map(|number| logps(number).len() as u32).eq(tokens));
        }
    }
}
