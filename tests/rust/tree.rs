//! Beginnings that groups share: counted, planned and laid out as a set of prefixes says.
#![allow(clippy::cast_sign_loss)] // counts and offsets

mod sample;

use std::collections::{BTreeMap, BTreeSet};

use logratio::{
    group::{Layout, NO_VALUES},
    layout::{Batch, Field, Options},
    plan::{Order, Plan, Request, plan},
    prefix_tree,
    store::Store,
};
use proptest::{collection::vec, prelude::*};
use sample::{Completion, Sample, store};

/// Groups that grow out of one another: prompts go on from prompts and from answers, of few ids.
fn related() -> impl Strategy<Value = Vec<Sample>> {
    let ids = |most| vec((0..3i32, 0..=1u8), 1..most);
    let completions = vec(ids(12), 1..4);
    vec((any::<usize>(), 0..4usize, ids(14), completions), 1..14).prop_map(|drawn| {
        let mut samples: Vec<Sample> = Vec::new();
        for (parent, how, own, completions) in drawn {
            let mut prompt = Vec::new();
            if let Some(parent) = samples.get(parent % (samples.len() + 1)) {
                prompt.clone_from(&parent.prompt);
                if how > 1 {
                    prompt.extend(parent.completions[how % parent.completions.len()].ids());
                }
            }
            if how != 1 || prompt.is_empty() {
                prompt.extend(own.iter().map(|&(id, _)| id));
            }
            let made = |(role, tokens): (u8, _)| Completion {
                tokens,
                role,
                values: NO_VALUES,
            };
            samples.push(Sample {
                prompt,
                completions: (0..4).zip(completions).map(made).collect(),
            });
        }
        samples
    })
}

/// What a group may share with: others whose prompts begin alike, or nobody.
type Class = (usize, Vec<i32>);

fn class(sample: &Sample, number: usize) -> Class {
    match sample.prompt.get(..prefix_tree::LEAST) {
        Some(start) => (usize::MAX, start.to_vec()),
        None => (number, Vec::new()),
    }
}

/// Every distinct beginning of the sequences of some groups.
fn prefixes(samples: &[Sample], groups: &[i64]) -> BTreeSet<(Class, Vec<i32>)> {
    let mut found = BTreeSet::new();
    for (number, &group) in groups.iter().enumerate() {
        let sample = &samples[group as usize];
        for completion in &sample.completions {
            let ids = [&sample.prompt[..], &completion.ids()].concat();
            let ends = 1..=ids.len();
            found.extend(ends.map(|end| (class(sample, number), ids[..end].to_vec())));
        }
    }
    found
}

/// The array of a tree layout, over the remains of another.
struct Laid {
    arena: Vec<i64>,
    table: logratio::layout::Table,
}

impl Laid {
    fn new(store: &Store, groups: &[i64], width: Option<usize>) -> Self {
        let fields: Vec<Field> = Field::ALL
            .into_iter()
            .filter(|field| field.is_in(Layout::Tree))
            .collect();
        let options = Options {
            fields: &fields,
            width,
            ..Options::new(Layout::Tree)
        };
        let batch = Batch::new(store, groups, options).expect("fits");
        let mut arena = vec![-7; batch.table().bytes() / 8];
        batch
            .fill(bytemuck::cast_slice_mut(&mut arena))
            .expect("room");
        Self {
            arena,
            table: batch.table().clone(),
        }
    }

    fn bytes(&self, field: Field) -> &[u8] {
        let entry = self.table.get(field).expect("laid out");
        &bytemuck::cast_slice(&self.arena)[entry.offset..entry.offset + entry.bytes()]
    }

    fn long(&self, field: Field) -> Vec<i64> {
        bytemuck::cast_slice(self.bytes(field)).to_vec()
    }

    fn short(&self, field: Field) -> Vec<usize> {
        let found: &[i32] = bytemuck::cast_slice(self.bytes(field));
        found.iter().map(|&value| value as usize).collect()
    }

    /// The tokens that each token sees, itself the last, by the sequences of queries and keys.
    fn contexts(&self) -> BTreeMap<usize, Vec<i64>> {
        let (queries, keys) = (self.short(Field::CuSeqlensQ), self.short(Field::CuSeqlensK));
        let (index, ids) = (self.long(Field::KeyIndex), self.long(Field::InputIds));
        let mut contexts = BTreeMap::new();
        for (queries, keys) in queries.windows(2).zip(keys.windows(2)) {
            for at in queries[0]..queries[1] {
                let seen = &index[keys[0]..keys[1] - (queries[1] - at - 1)];
                assert_eq!(seen.last(), Some(&(at as i64)));
                contexts.insert(at, seen.iter().map(|&key| ids[key as usize]).collect());
            }
        }
        contexts
    }
}

fn updates(plan: &Plan) -> Vec<BTreeSet<i64>> {
    let micro = |at: &i64| plan.micro_offsets[*at as usize] as usize;
    let update = |pair: &[i64]| plan.order[micro(&pair[0])..micro(&pair[1])].iter().copied();
    let offsets = plan.update_offsets.windows(2);
    offsets.map(|pair| update(pair).collect()).collect()
}

proptest! {
    #[test]
    fn a_tree_has_a_token_for_each_distinct_beginning(samples in related(), cut in 0..9i64) {
        let store = store(&samples);
        let groups: Vec<i64> = (0..samples.len() as i64).chain([0]).collect();
        let cut = cut.min(groups.len() as i64);
        let counts = prefix_tree::count(&store, &groups, &[0, cut, groups.len() as i64]).expect("counts");
        let (first, second) = groups.split_at(cut as usize);
        let expected = [first, second].map(|groups| prefixes(&samples, groups).len() as u64);
        prop_assert_eq!(&counts, &expected);
        let fitting = prefix_tree::fit(&store, second, 40).expect("fits");
        let tokens = |count: usize| prefixes(&samples, &second[..count]).len();
        prop_assert!(fitting == second.len().min(1) || tokens(fitting) <= 40);
        prop_assert!(fitting == second.len() || tokens(fitting + 1) > 40);
    }

    #[test]
    fn a_layout_asks_what_the_samples_ask(samples in related(), extra in 0..3usize) {
        let store = store(&samples);
        let groups: Vec<i64> = (0..samples.len() as i64).rev().collect();
        let tokens = prefixes(&samples, &groups).len();
        let laid = Laid::new(&store, &groups, Some(tokens + extra));
        let (contexts, positions) = (laid.contexts(), laid.long(Field::PositionIds));
        prop_assert_eq!(positions.len(), tokens + extra);
        let mut asked = laid.long(Field::LogitIndex).into_iter().zip(laid.long(Field::TargetIds));
        for sample in groups.iter().map(|&group| &samples[group as usize]) {
            for completion in &sample.completions {
                let mut context: Vec<i64> = sample.prompt.iter().map(|&id| id.into()).collect();
                for id in completion.ids() {
                    let (at, target) = asked.next().expect("a target");
                    prop_assert_eq!(&contexts[&(at as usize)], &context);
                    prop_assert_eq!(positions[at as usize], context.len() as i64 - 1);
                    prop_assert_eq!(target, i64::from(id));
                    context.push(target);
                }
            }
        }
        prop_assert!(asked.next().is_none());
        // Every other array is that of the shared layout.
        let shared = Batch::new(&store, &groups, Options::new(Layout::Shared)).expect("fits");
        let mut arena = vec![0i64; shared.table().bytes() / 8];
        let arena: &mut [u8] = bytemuck::cast_slice_mut(&mut arena);
        shared.fill(arena).expect("room");
        for entry in shared.table().entries() {
            if !matches!(entry.field, Field::InputIds | Field::PositionIds | Field::LogitIndex) {
                let bytes = &arena[entry.offset..entry.offset + entry.bytes()];
                prop_assert_eq!(laid.bytes(entry.field), bytes);
            }
        }
    }

    #[test]
    fn a_plan_keeps_the_updates_and_the_budget(
        samples in related(), size in 1..9usize, budget in 1..120usize, world_size in 1..3usize,
    ) {
        let store = store(&samples);
        let shapes = store.shapes().expect("whole");
        let shared = Request { world_size, ..Request::new(Order::Shuffled, size, budget) };
        let tree = Request { layout: Layout::Tree, store: Some(&store), ..shared };
        for rank in 0..world_size {
            let plans = [shared, tree].map(|request| {
                plan(&shapes, &Request { rank, ..request }).expect("plans")
            });
            prop_assert_eq!(updates(&plans[0]), updates(&plans[1]));
            let micro = plans[1].micro_offsets.windows(2);
            for groups in micro.map(|pair| &plans[1].order[pair[0] as usize..pair[1] as usize]) {
                let tokens = prefixes(&samples, groups).len();
                prop_assert!(tokens <= budget || groups.len() == 1);
            }
        }
    }
}

/// Conversations of `turns` rated turns below one system prompt, in no order.
fn conversations(count: usize, turns: usize) -> Vec<Sample> {
    let ids = |from: usize, length: usize| (from..from + length).map(|id| id as i32);
    let mut samples = Vec::new();
    for talk in 0..count {
        let mut prompt: Vec<i32> = ids(0, 20).collect();
        for turn in 0..turns {
            let start = 1000 * talk + 100 * turn;
            prompt.extend(ids(start + 100, 5));
            let answer = |role: usize| Completion {
                tokens: ids(start + 110 + 10 * role, 10).map(|id| (id, 1)).collect(),
                role: role as u8,
                values: NO_VALUES,
            };
            let completions = vec![answer(0), answer(1)];
            samples.push(Sample {
                prompt: prompt.clone(),
                completions,
            });
            prompt.extend(ids(start + 110, 10));
        }
    }
    samples.sort_by_key(|sample| sample.prompt.iter().map(|id| id * 7919 % 101).sum::<i32>());
    samples
}

#[test]
fn what_begins_alike_comes_together_and_counts_once() {
    let samples = conversations(6, 4);
    let store = store(&samples);
    let request = Request {
        layout: Layout::Tree,
        store: Some(&store),
        ..Request::new(Order::Shuffled, 24, 230)
    };
    let plan = plan(&store.shapes().expect("whole"), &request).expect("plans");
    let groups: Vec<i64> = (0..24).collect();
    // 20 of the system prompt; each turn 5 of its prompt and 10 of each of its two answers.
    assert_eq!(
        prefix_tree::count(&store, &groups, &[0, 24]).expect("counts"),
        [20 + 24 * 25]
    );
    let tokens = prefix_tree::count(&store, &plan.order, &plan.micro_offsets).expect("counts");
    assert_eq!(tokens.len(), 3);
    assert!(
        tokens.iter().sum::<u64>() <= 3 * 20 + 24 * 25 + 2 * 30,
        "{tokens:?}"
    );
    let order = prefix_tree::order(&store, &groups).expect("orders");
    let talks: Vec<i32> = order
        .iter()
        .map(|&at| samples[at as usize].prompt[20] / 1000)
        .collect();
    let turns = [0, 1, 2, 3, 4, 5].map(|talk| [talk; 4]).concat();
    assert_eq!(talks, turns);
}

#[test]
fn a_plan_without_shared_beginnings_is_the_shared_one() {
    let samples = sample::fixed(40);
    let store = store(&samples);
    let shapes = store.shapes().expect("whole");
    let shared = Request::new(Order::LengthGrouped, 8, 60);
    let tree = Request {
        layout: Layout::Tree,
        store: Some(&store),
        ..shared
    };
    let count = |request| plan(&shapes, &request).expect("plans").micro_offsets.len();
    assert_eq!(count(shared), count(tree));
    let missing = Request {
        store: None,
        ..tree
    };
    assert!(plan(&shapes, &missing).is_err());
}
