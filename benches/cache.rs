//! The reference cache: appending, opening, joining and reading rows.

use std::{hint::black_box, path::Path};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use logratio::{
    cache::{CacheReader, CacheWriter},
    content_key::Key,
};

const FINGERPRINT: [u8; 32] = [7; 32];
/// Log-probs of one completion.
const TOKENS: usize = 256;
/// Completions of one block.
const BLOCK: usize = 64;

fn key(number: usize) -> Key {
    *blake3::hash(&number.to_le_bytes()).as_bytes()
}

fn keys(count: usize) -> Vec<Key> {
    (0..count).map(key).collect()
}

/// Appends `blocks` blocks to a new journal.
fn fill(folder: &Path, blocks: usize) {
    let mut writer = CacheWriter::create(folder, &FINGERPRINT).expect("creates");
    let offsets: Vec<i64> = (0..=BLOCK).map(|record| (record * TOKENS) as i64).collect();
    let logps = vec![-1.5; BLOCK * TOKENS];
    for block in keys(blocks * BLOCK).chunks(BLOCK) {
        writer.append(block, &offsets, &logps).expect("appends");
    }
}

fn bench_append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append");
    group.sample_size(10);
    group.throughput(Throughput::Elements(10 * BLOCK as u64));
    group.bench_function("10 durable blocks of 64 completions", |bench| {
        bench.iter(|| fill(tempfile::tempdir().expect("folder").path(), 10));
    });
}

fn bench_read(criterion: &mut Criterion) {
    const COMPLETIONS: usize = 400 * BLOCK;
    let folder = tempfile::tempdir().expect("folder");
    fill(folder.path(), COMPLETIONS / BLOCK);
    let open = || CacheReader::open(folder.path(), &FINGERPRINT).expect("opens");
    let (reader, keys) = (open(), keys(COMPLETIONS));
    let rows = reader.join(&keys[..BLOCK]).expect("joins");
    let mut group = criterion.benchmark_group("25,600 completions");
    group.throughput(Throughput::Elements(COMPLETIONS as u64));
    group.bench_function("open and check", |bench| bench.iter(open));
    group.bench_function("join", |bench| bench.iter(|| reader.join(black_box(&keys))));
    group.throughput(Throughput::Elements(BLOCK as u64));
    group.bench_function("read 64 rows", |bench| {
        bench.iter(|| reader.read(black_box(&rows)));
    });
}

criterion_group!(benches, bench_append, bench_read);
criterion_main!(benches);
