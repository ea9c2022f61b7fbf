//! From a store to a batch: planning an epoch and laying out a micro-batch.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use logratio::{
    group::Group,
    layout::{Candidates, Padded, Shared},
    plan::{Layout, Order, Request, Shape, plan},
    store::{Store, StoreWriter},
};

/// Pairs with a prompt of 64 to 319 tokens and answers of 32 to 287.
fn pairs(count: usize) -> Store {
    let mut writer = StoreWriter::in_memory();
    let ids: Vec<i32> = (0..1000).collect();
    for pair in 0..count {
        let [prompt, chosen, rejected] = [(64, 7919), (32, 104_729), (32, 1_299_709)]
            .map(|(least, step)| least + pair * step % 256);
        let group = Group {
            prompt_ids: &ids[..prompt],
            completion_ids: &ids[..chosen + rejected],
            completion_mask: &vec![1; chosen + rejected],
            completion_lengths: &[chosen as u32, rejected as u32],
            roles: &[0, 1],
            file: 0,
            line: pair as u64,
        };
        writer.push(&group).expect("a pair");
    }
    writer.finish("{}").expect("seals")
}

fn bench_plan(criterion: &mut Criterion) {
    let shape = |group: usize| 64 + group * 7919 % 960;
    let shapes: Vec<Shape> = (0..1_000_000)
        .map(|group| Shape {
            tokens: shape(group),
            rows: 2,
            longest: shape(group) / 2,
        })
        .collect();
    let mut group = criterion.benchmark_group("plan a million pairs");
    group.sample_size(10);
    for (name, order) in [
        ("length grouped", Order::LengthGrouped),
        ("shuffled", Order::Shuffled),
        ("sorted", Order::Sorted),
    ] {
        let request = Request {
            order,
            seed: 0,
            epoch: 0,
            groups_per_update: 32,
            token_budget: 8192,
            layout: Layout::Shared,
            rank: 0,
            world_size: 8,
        };
        group.bench_function(name, |bench| {
            bench.iter(|| plan(black_box(&shapes), &request));
        });
    }
}

fn bench_layouts(criterion: &mut Criterion) {
    let store = pairs(4096);
    let groups: Vec<i64> = (0..8).map(|number| number * 509).collect();
    let tokens = Shared::new(&store, &groups)
        .expect("in range")
        .input_ids
        .len();
    let mut group = criterion.benchmark_group("lay out 8 pairs");
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function("shared", |bench| {
        bench.iter(|| Shared::new(&store, black_box(&groups)));
    });
    group.bench_function("padded", |bench| {
        bench.iter(|| Padded::new(&store, black_box(&groups)));
    });
    let prompt: Vec<i32> = (0..256).collect();
    let candidates = vec![vec![&prompt[..128]; 16]];
    group.bench_function("candidates", |bench| {
        bench.iter(|| Candidates::new(&[&prompt], black_box(&candidates), 128));
    });
}

fn bench_keys(criterion: &mut Criterion) {
    let store = pairs(4096);
    let mut group = criterion.benchmark_group("store of 4096 pairs");
    group.throughput(Throughput::Elements(store.tokens() as u64));
    group.bench_function("keys", |bench| bench.iter(|| store.keys()));
    group.bench_function("verify", |bench| bench.iter(|| store.verify()));
    group.bench_function("write", |bench| bench.iter(|| pairs(4096)));
}

criterion_group!(benches, bench_plan, bench_layouts, bench_keys);
criterion_main!(benches);
