//! From a store to a batch: planning an epoch and laying out a micro-batch.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use logratio::{
    group::{Group, Layout, Shape},
    layout::{Batch, Candidates, Options},
    plan::{Order, Request, plan},
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
            values: &[],
            file: 0,
            line: pair as u64,
        };
        writer.push(&group).expect("a pair");
    }
    writer.finish("{}").expect("seals")
}

fn bench_plan(criterion: &mut Criterion) {
    let shape = |group: usize| {
        let [chosen, rejected] = [104_729, 1_299_709].map(|step| 32 + (group * step % 256) as u32);
        Shape::new(64 + group * 7919 % 256, [chosen, rejected].into_iter())
    };
    let shapes: Vec<Shape> = (0..1_000_000).map(shape).collect();
    let mut group = criterion.benchmark_group("plan a million pairs");
    group.sample_size(10);
    for (name, order) in [
        ("length grouped", Order::LengthGrouped),
        ("shuffled", Order::Shuffled),
        ("sorted", Order::Sorted),
    ] {
        let request = Request {
            world_size: 8,
            ..Request::new(order, 64, 8192)
        };
        group.bench_function(name, |bench| {
            bench.iter(|| plan(black_box(&shapes), &request));
        });
    }
}

fn bench_layouts(criterion: &mut Criterion) {
    let store = pairs(4096);
    let lengths = store.shared_lengths().expect("whole");
    let groups: Vec<i64> = (0..8).map(|number| number * 509).collect();
    let mut arena = vec![0i64; 1 << 17];
    let mut group = criterion.benchmark_group("lay out 8 pairs");
    let tokens: u32 = (0..8).map(|number| lengths[number * 509]).sum();
    group.throughput(Throughput::Elements(u64::from(tokens)));
    for (name, layout) in [("shared", Layout::Shared), ("padded", Layout::Padded)] {
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let batch = Batch::new(&store, black_box(&groups), Options::new(layout));
                let arena = bytemuck::cast_slice_mut(&mut arena);
                batch.and_then(|batch| batch.fill(arena)).expect("fits");
            });
        });
    }
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
