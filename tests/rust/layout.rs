//! Both training layouts give back the ids and describe the same conditionals.
#![allow(clippy::cast_sign_loss, clippy::cast_precision_loss)] // counts and offsets

mod sample;

use logratio::{
    group::Layout,
    layout::{Batch, Candidates, Entry, Field, Options, Side},
    store::Store,
};
use proptest::{collection::vec, prelude::*};
use sample::{Sample, fixed, samples, store};

/// A batch laid out over the remains of another, every array of it.
struct Filled {
    entries: Vec<Entry>,
    arena: Vec<i64>,
}

impl Filled {
    fn new(store: &Store, groups: &[i64], options: Options<'_>) -> Self {
        let fields: Vec<Field> = Field::ALL
            .into_iter()
            .filter(|field| field.is_in(options.layout))
            .collect();
        let batch = Batch::new(
            store,
            groups,
            Options {
                fields: &fields,
                ..options
            },
        )
        .expect("fits");
        let bytes = batch.table().bytes();
        assert_eq!(bytes % 64, 0);
        let mut arena = vec![i64::from_le_bytes([0xA5; 8]); bytes / 8];
        batch
            .fill(bytemuck::cast_slice_mut(&mut arena))
            .expect("room enough");
        Self {
            entries: batch.table().entries().to_vec(),
            arena,
        }
    }

    fn entry(&self, field: Field) -> &Entry {
        let found = self.entries.iter().find(|entry| entry.field == field);
        found.expect("every array of the layout was asked for")
    }

    fn bytes(&self, field: Field) -> &[u8] {
        let entry = self.entry(field);
        assert_eq!(entry.offset % 64, 0);
        &bytemuck::cast_slice(&self.arena)[entry.offset..entry.offset + entry.bytes()]
    }

    fn numbers(&self, field: Field) -> Vec<i64> {
        bytemuck::cast_slice(self.bytes(field)).to_vec()
    }

    fn targets(&self) -> Targets {
        Targets {
            prompt_lengths: self.numbers(Field::PromptLengths),
            completion_lengths: self.numbers(Field::CompletionLengths),
            group_sizes: self.numbers(Field::GroupSizes),
            logit_index: self.numbers(Field::LogitIndex),
            target_ids: self.numbers(Field::TargetIds),
            completion_mask: self
                .bytes(Field::CompletionMask)
                .iter()
                .map(|&value| value == 1)
                .collect(),
            completion_of: self.numbers(Field::CompletionOf),
            completion_offsets: self.numbers(Field::CompletionOffsets),
            roles: self.bytes(Field::Roles).to_vec(),
            groups: self.numbers(Field::Groups),
            completions: self.numbers(Field::Completions),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Targets {
    prompt_lengths: Vec<i64>,
    completion_lengths: Vec<i64>,
    group_sizes: Vec<i64>,
    logit_index: Vec<i64>,
    target_ids: Vec<i64>,
    completion_mask: Vec<bool>,
    completion_of: Vec<i64>,
    completion_offsets: Vec<i64>,
    roles: Vec<u8>,
    groups: Vec<i64>,
    completions: Vec<i64>,
}

struct Shared {
    input_ids: Vec<i64>,
    position_ids: Vec<i64>,
    targets: Targets,
}

struct Padded {
    rows: usize,
    width: usize,
    input_ids: Vec<i64>,
    attention_mask: Vec<i64>,
    position_ids: Vec<i64>,
    targets: Targets,
}

impl Shared {
    fn new(store: &Store, groups: &[i64]) -> Self {
        let filled = Filled::new(store, groups, Options::new(Layout::Shared));
        Self {
            input_ids: filled.numbers(Field::InputIds),
            position_ids: filled.numbers(Field::PositionIds),
            targets: filled.targets(),
        }
    }
}

impl Padded {
    fn new(store: &Store, groups: &[i64], side: Side) -> Self {
        let filled = Filled::new(
            store,
            groups,
            Options {
                side,
                ..Options::new(Layout::Padded)
            },
        );
        let entry = filled.entry(Field::InputIds);
        Self {
            rows: entry.rows.expect("a matrix"),
            width: entry.width,
            input_ids: filled.numbers(Field::InputIds),
            attention_mask: filled.numbers(Field::AttentionMask),
            position_ids: filled.numbers(Field::PositionIds),
            targets: filled.targets(),
        }
    }
}

/// What the model is asked at one target: every token it may see, the position of the last of them,
/// and the token to predict.
#[derive(Debug, PartialEq)]
struct Conditional {
    context: Vec<i64>,
    position: i64,
    target: i64,
}

/// Walks the targets completion by completion: prompt's first token, completion's first token.
fn conditionals(
    ids: &[i64],
    positions: &[i64],
    targets: &Targets,
    prompt_start: impl Fn(usize, usize) -> usize,
) -> Vec<Conditional> {
    let mut found = Vec::new();
    let sizes = targets.group_sizes.iter().enumerate();
    let groups = sizes.flat_map(|(group, &size)| vec![group; size as usize]);
    for (completion, group) in groups.enumerate() {
        let prompt = targets.prompt_lengths[group] as usize;
        let start = prompt_start(completion, group);
        let (from, to) = (
            targets.completion_offsets[completion] as usize,
            targets.completion_offsets[completion + 1] as usize,
        );
        for target in from..to {
            let last = targets.logit_index[target] as usize;
            let own = last + 1 - (to - from).min(target - from);
            let mut context = ids[start..start + prompt].to_vec();
            if target > from {
                context.extend(&ids[own..=last]);
            }
            found.push(Conditional {
                context,
                position: positions[last],
                target: targets.target_ids[target],
            });
        }
    }
    found
}

fn of_shared(layout: &Shared) -> Vec<Conditional> {
    let targets = &layout.targets;
    let first_of =
        |group: usize| -> usize { targets.group_sizes[..group].iter().sum::<i64>() as usize };
    let start = |_: usize, group: usize| {
        let prompts: i64 = targets.prompt_lengths[..group].iter().sum();
        (prompts + targets.completion_offsets[first_of(group)]) as usize
    };
    conditionals(&layout.input_ids, &layout.position_ids, targets, start)
}

fn of_padded(layout: &Padded) -> Vec<Conditional> {
    let targets = &layout.targets;
    let start = |completion: usize, _: usize| {
        let last = targets.logit_index[targets.completion_offsets[completion] as usize] as usize;
        let row = last / layout.width;
        let cells = &layout.attention_mask[row * layout.width..(row + 1) * layout.width];
        row * layout.width + cells.iter().position(|&value| value == 1).expect("a token")
    };
    conditionals(&layout.input_ids, &layout.position_ids, targets, start)
}

/// The same from the samples, with no layout in between.
fn of_samples(samples: &[Sample], groups: &[i64]) -> Vec<Conditional> {
    let mut found = Vec::new();
    for sample in groups.iter().map(|&group| &samples[group as usize]) {
        for completion in &sample.completions {
            let mut context: Vec<i64> = sample.prompt.iter().map(|&id| i64::from(id)).collect();
            for id in completion.ids() {
                found.push(Conditional {
                    context: context.clone(),
                    position: context.len() as i64 - 1,
                    target: i64::from(id),
                });
                context.push(i64::from(id));
            }
        }
    }
    found
}

fn samples_and_groups() -> impl Strategy<Value = (Vec<Sample>, Vec<i64>)> {
    samples(8)
        .prop_filter("some group", |samples| !samples.is_empty())
        .prop_flat_map(|samples| {
            let groups = vec(0..samples.len() as i64, 0..6);
            (Just(samples), groups)
        })
}

/// Groups as lists of ids and masks, from the flat targets.
fn uncollated(targets: &Targets) -> Vec<(Vec<i64>, Vec<bool>, u8)> {
    let ranges = targets
        .completion_offsets
        .windows(2)
        .map(|pair| pair[0] as usize..pair[1] as usize);
    ranges
        .zip(&targets.roles)
        .map(|(range, &role)| {
            let (ids, mask) = (
                &targets.target_ids[range.clone()],
                &targets.completion_mask[range],
            );
            (ids.to_vec(), mask.to_vec(), role)
        })
        .collect()
}

proptest! {
    #[test]
    fn both_layouts_ask_what_the_samples_ask((samples, groups) in samples_and_groups()) {
        let store = store(&samples);
        let expected = of_samples(&samples, &groups);
        prop_assert_eq!(&of_shared(&Shared::new(&store, &groups)), &expected);
        for side in [Side::Left, Side::Right] {
            prop_assert_eq!(&of_padded(&Padded::new(&store, &groups, side)), &expected);
        }
    }

    #[test]
    fn everything_but_the_logit_index_is_equal((samples, groups) in samples_and_groups()) {
        let store = store(&samples);
        let mut shared = Shared::new(&store, &groups).targets;
        let padded = Padded::new(&store, &groups, Side::Left).targets;
        shared.logit_index.clone_from(&padded.logit_index);
        prop_assert_eq!(shared, padded);
    }

    #[test]
    fn uncollating_gives_back_the_ids((samples, groups) in samples_and_groups()) {
        let layout = Shared::new(&store(&samples), &groups);
        let expected: Vec<_> = groups
            .iter()
            .flat_map(|&group| &samples[group as usize].completions)
            .map(|one| {
                let ids: Vec<i64> = one.ids().into_iter().map(i64::from).collect();
                let mask: Vec<bool> = one.mask().into_iter().map(|value| value == 1).collect();
                (ids, mask, one.role)
            })
            .collect();
        prop_assert_eq!(uncollated(&layout.targets), expected);
        prop_assert_eq!(&layout.targets.groups, &groups);
    }

    #[test]
    fn padding_is_zero_and_nothing_else_is((samples, groups) in samples_and_groups()) {
        let layout = Padded::new(&store(&samples), &groups, Side::Right);
        let rows = layout.attention_mask.chunks_exact(layout.width.max(1));
        for (row, mask) in rows.enumerate() {
            let length = mask.iter().sum::<i64>() as usize;
            let cells = row * layout.width..(row + 1) * layout.width;
            let positions: Vec<i64> = (0..length as i64).collect();
            prop_assert!(mask[..length].iter().all(|&value| value == 1));
            prop_assert_eq!(&layout.position_ids[cells.clone()][..length], &positions[..]);
            prop_assert!(layout.position_ids[cells.clone()][length..].iter().all(|&at| at == 0));
            prop_assert!(layout.input_ids[cells][length..].iter().all(|&id| id == 0));
        }
    }
}

#[test]
fn padded_rows_are_completion_major() {
    let samples = fixed(3); // 1, 2 and 3 completions
    let layout = Padded::new(&store(&samples), &[2, 0, 1], Side::Right);
    let rows = [(2, 0), (0, 0), (1, 0), (2, 1), (1, 1), (2, 2)];
    assert_eq!(layout.rows, rows.len());
    for (row, (group, number)) in rows.into_iter().enumerate() {
        let sample = &samples[group];
        let expected: Vec<i64> = [&sample.prompt[..], &sample.completions[number].ids()]
            .concat()
            .into_iter()
            .map(i64::from)
            .collect();
        let start = row * layout.width;
        assert_eq!(layout.input_ids[start..start + expected.len()], expected);
    }
    assert_eq!(layout.targets.completions, [3, 4, 5, 0, 1, 2]);
}

fn refusal(groups: &[i64], options: Options<'_>) -> String {
    let store = store(&fixed(3));
    Batch::new(&store, groups, options)
        .expect_err("refused")
        .to_string()
}

#[test]
fn what_cannot_be_laid_out_is_refused() {
    let (shared, padded) = (Options::new(Layout::Shared), Options::new(Layout::Padded));
    assert!(refusal(&[0, 3], shared).contains("group 3 is out of range"));
    assert!(refusal(&[-1], padded).contains("group -1 is out of range"));
    let options = Options {
        multiple_of: 0,
        ..shared
    };
    assert_eq!(refusal(&[0], options), "multiple_of must be at least 1");
    let options = Options {
        width: Some(2),
        ..shared
    };
    assert_eq!(
        refusal(&[1], options),
        "a row of 25 tokens does not fit in a width of 2"
    );
    let options = Options {
        fields: &[Field::InputIds, Field::KeyIndex],
        ..padded
    };
    assert_eq!(refusal(&[0], options), "the padded layout has no key_index");
    assert!("middle".parse::<Side>().is_err());
    assert!("logits".parse::<Field>().is_err());
}

#[test]
fn a_buffer_that_is_too_small_or_askew_is_refused() {
    let store = store(&fixed(3));
    let batch = Batch::new(&store, &[0, 1], Options::new(Layout::Shared)).expect("in range");
    let mut arena = vec![0i64; batch.table().bytes() / 8 + 1];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut arena);
    let refusal = |arena: &mut [u8]| batch.fill(arena).expect_err("refused").to_string();
    let short = batch.table().bytes() - 1;
    assert!(refusal(&mut bytes[..short]).contains("the buffer has"));
    assert!(refusal(&mut bytes[1..]).contains("a multiple of 8"));
    assert!(batch.fill(bytes).is_ok());
}

#[test]
fn no_group_is_an_empty_batch() {
    let store = store(&fixed(1));
    for layout in [Layout::Shared, Layout::Padded] {
        let filled = Filled::new(&store, &[], Options::new(layout));
        assert!(filled.numbers(Field::InputIds).is_empty());
        assert_eq!(filled.numbers(Field::CompletionOffsets), [0]);
    }
}

proptest! {
    #[test]
    fn candidates_hold_every_token_once(
        groups in vec((vec(1..9i32, 1..6), vec(vec(1..9i32, 1..6), 1..4)), 1..5),
        chunk in 1usize..9,
    ) {
        let prompts: Vec<&[i32]> = groups.iter().map(|(prompt, _)| &prompt[..]).collect();
        let candidates: Vec<Vec<&[i32]>> =
            groups.iter().map(|(_, all)| all.iter().map(|ids| &ids[..]).collect()).collect();
        let layout = Candidates::new(&prompts, &candidates, chunk).expect("well formed");
        let flat: Vec<(i64, &[i32])> = candidates
            .iter()
            .enumerate()
            .flat_map(|(group, all)| all.iter().map(move |&ids| (group as i64, ids)))
            .collect();
        for (row, &prompt) in prompts.iter().enumerate() {
            let cells = row * layout.prompt_width..(row + 1) * layout.prompt_width;
            let padding = layout.prompt_width - prompt.len();
            let mask = [vec![0; padding], vec![1; prompt.len()]].concat();
            let ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
            prop_assert_eq!(&layout.prompt_mask[cells.clone()], &mask[..]);
            prop_assert_eq!(&layout.prompt_ids[cells], &[vec![0; padding], ids].concat()[..]);
        }
        let mut scored = vec![Vec::new(); flat.len() + 1];
        for (&index, &row) in layout.token_index.iter().zip(&layout.token_row) {
            scored[row as usize].push(index as usize);
        }
        prop_assert_eq!(layout.token_index.len() % chunk, 0);
        prop_assert!(scored.pop().expect("padding").len() < chunk);
        for (row, (group, ids)) in flat.into_iter().enumerate() {
            let start = row * layout.candidate_width;
            prop_assert_eq!(layout.group[row], group);
            prop_assert_eq!(&scored[row], &(start..start + ids.len()).collect::<Vec<_>>());
            let found: Vec<i32> = scored[row].iter().map(|&at| layout.candidate_ids[at] as i32).collect();
            prop_assert_eq!(found, ids);
            let mask = &layout.candidate_mask[start..start + layout.candidate_width];
            prop_assert_eq!(mask.iter().sum::<i64>(), ids.len() as i64);
            prop_assert!(mask[..ids.len()].iter().all(|&value| value == 1));
        }
    }
}

#[test]
fn candidates_that_cannot_be_scored_are_refused() {
    let refusal = |prompts: &[&[i32]], candidates: &[Vec<&[i32]>], chunk| {
        Candidates::new(prompts, candidates, chunk)
            .expect_err("refused")
            .to_string()
    };
    let one = || -> Vec<&[i32]> { vec![&[1]] };
    assert_eq!(
        refusal(&[&[1]], &[one()], 0),
        "chunk must be 1 to 65536, not 0"
    );
    assert_eq!(refusal(&[], &[], 1), "there is no prompt");
    assert_eq!(refusal(&[&[1]], &[], 1), "1 prompts, but candidates for 0");
    assert_eq!(refusal(&[&[]], &[one()], 1), "prompt 0 is empty");
    assert_eq!(
        refusal(&[&[1], &[1]], &[one(), vec![]], 1),
        "prompt 1 has no candidate"
    );
    assert_eq!(
        refusal(&[&[1]], &[vec![&[1], &[]]], 1),
        "candidate 1 is empty"
    );
}
