//! The store: pushing, opening, first and later reads, keys.

use std::{hint::black_box, path::Path};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use logratio::store::{Bulk, Store, StoreWriter};

/// Pairs of one `push_many`.
const MANY: usize = 8192;

/// Columns of pairs of about 100 tokens, no two of them the same.
struct Pairs {
    prompt_ids: Vec<i32>,
    prompt_lengths: Vec<u32>,
    completion_ids: Vec<i32>,
    completion_mask: Vec<u8>,
    completion_lengths: Vec<u32>,
    group_sizes: Vec<u32>,
    roles: Vec<u8>,
    files: Vec<u32>,
    lines: Vec<u64>,
}

impl Pairs {
    fn new() -> Self {
        let length = |number: usize, least: usize| (least + number * 7919 % 30) as u32;
        let prompt_lengths: Vec<u32> = (0..MANY).map(|pair| length(pair, 25)).collect();
        let completion_lengths: Vec<u32> = (0..2 * MANY).map(|row| length(row, 15)).collect();
        let sum = |lengths: &[u32]| lengths.iter().sum::<u32>() as i32;
        let completion_ids: Vec<i32> = (0..sum(&completion_lengths)).collect();
        Self {
            prompt_ids: (0..sum(&prompt_lengths)).collect(),
            prompt_lengths,
            completion_mask: vec![1; completion_ids.len()],
            completion_ids,
            completion_lengths,
            group_sizes: vec![2; MANY],
            roles: [0, 1].repeat(MANY),
            files: vec![0; MANY],
            lines: (0..MANY as u64).collect(),
        }
    }

    fn push(&self, writer: &mut StoreWriter) {
        let bulk = Bulk {
            prompt_ids: &self.prompt_ids,
            prompt_lengths: &self.prompt_lengths,
            completion_ids: &self.completion_ids,
            completion_mask: &self.completion_mask,
            completion_lengths: &self.completion_lengths,
            group_sizes: &self.group_sizes,
            roles: &self.roles,
            values: &[],
            files: &self.files,
            lines: &self.lines,
        };
        black_box(writer.push_many(&bulk).expect("right"));
    }

    /// Other prompts: the next pairs of a stream.
    fn move_on(&mut self) {
        for id in &mut self.prompt_ids {
            *id = (*id + 1_000_003) % 2_000_000_011;
        }
    }
}

fn bench_push(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("folder");
    let mut group = criterion.benchmark_group("push 8192 pairs");
    group.throughput(Throughput::Elements(MANY as u64));
    for (name, deduplicate) in [("as they come", false), ("without duplicates", true)] {
        let mut pairs = Pairs::new();
        let writer = StoreWriter::create(&folder.path().join("a.store")).expect("creates");
        let mut writer = if deduplicate {
            writer.deduplicating().expect("empty")
        } else {
            writer
        };
        group.bench_function(name, |bench| {
            bench.iter(|| {
                pairs.push(&mut writer);
                pairs.move_on();
            });
        });
    }
    let mut writer = StoreWriter::in_memory().deduplicating().expect("empty");
    let pairs = Pairs::new();
    pairs.push(&mut writer);
    group.bench_function("that are all duplicates", |bench| {
        bench.iter(|| pairs.push(&mut writer));
    });
}

/// A store of 262,144 pairs, about 130 MB.
fn sealed(path: &Path) -> Store {
    let mut writer = StoreWriter::create(path).expect("creates");
    let mut pairs = Pairs::new();
    for _ in 0..32 {
        pairs.push(&mut writer);
        pairs.move_on();
    }
    writer.finish("{}").expect("seals")
}

fn bench_read(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.store");
    let store = sealed(&path);
    let open = || Store::open(&path).expect("opens");
    let groups = store.len();
    let read = |store: &Store| {
        let some = (0..groups).step_by(groups / 64);
        some.map(|group| store.group(group as i64).expect("whole").tokens.len())
            .sum::<usize>()
    };
    let mut group = criterion.benchmark_group("store of 262,144 pairs");
    group.sample_size(20);
    group.bench_function("open", |bench| bench.iter(open));
    group.bench_function("64 groups, first read", |bench| {
        bench.iter_batched(open, |store| read(&store), BatchSize::PerIteration);
    });
    group.bench_function("64 groups, read again", |bench| bench.iter(|| read(&store)));
    group.bench_function("shapes", |bench| bench.iter(|| store.shapes()));
    group.bench_function("keys", |bench| bench.iter(|| store.keys()));
    group.bench_function("verify", |bench| bench.iter(|| store.verify()));
}

criterion_group!(benches, bench_push, bench_read);
criterion_main!(benches);
