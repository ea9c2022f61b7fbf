//! What a writer keeps, leaves out and refuses.
#![allow(clippy::cast_sign_loss)] // numbers of groups

mod sample;

use std::{collections::HashMap, fs, path::Path};

use logratio::{
    Error,
    group::{Group, NO_VALUES, VALUES, Values},
    store::{Bulk, Outcome, Store, StoreWriter},
};
use proptest::{collection::vec, prelude::*};
use sample::{Completion, Sample, assert_holds, bits, fixed, samples};

/// The columns of many groups, as [`Bulk`] borrows them.
#[derive(Clone, Default)]
struct Columns {
    prompt_ids: Vec<i32>,
    prompt_lengths: Vec<u32>,
    completion_ids: Vec<i32>,
    completion_mask: Vec<u8>,
    completion_lengths: Vec<u32>,
    group_sizes: Vec<u32>,
    roles: Vec<u8>,
    values: Vec<Values>,
    files: Vec<u32>,
    lines: Vec<u64>,
}

impl Columns {
    fn of(samples: &[Sample]) -> Self {
        Self::numbered(0, samples)
    }

    /// With the sources that [`sample::fill`] gives to the groups from `first` on.
    fn numbered(first: usize, samples: &[Sample]) -> Self {
        let mut all = Self::default();
        for (number, sample) in (first..).zip(samples) {
            all.prompt_ids.extend(&sample.prompt);
            all.prompt_lengths.push(sample.prompt.len() as u32);
            all.group_sizes.push(sample.completions.len() as u32);
            all.files.push(number as u32 % 3);
            all.lines.push(number as u64 + 1);
            for one in &sample.completions {
                all.completion_ids.extend(one.ids());
                all.completion_mask.extend(one.mask());
                all.completion_lengths.push(one.tokens.len() as u32);
                all.roles.push(one.role);
                all.values.push(one.values);
            }
        }
        all
    }

    fn bulk(&self) -> Bulk<'_> {
        Bulk {
            prompt_ids: &self.prompt_ids,
            prompt_lengths: &self.prompt_lengths,
            completion_ids: &self.completion_ids,
            completion_mask: &self.completion_mask,
            completion_lengths: &self.completion_lengths,
            group_sizes: &self.group_sizes,
            roles: &self.roles,
            values: &self.values,
            files: &self.files,
            lines: &self.lines,
        }
    }
}

fn deduplicating() -> StoreWriter {
    StoreWriter::in_memory().deduplicating().expect("empty")
}

fn pair(prompt: i32, chosen: i32, rejected: i32) -> Sample {
    let completion = |id: i32, role: u8| Completion {
        tokens: vec![(id, 1)],
        role,
        values: NO_VALUES,
    };
    Sample {
        prompt: vec![prompt],
        completions: vec![completion(chosen, 0), completion(rejected, 1)],
    }
}

/// Groups of few tokens, so that many say the same or the opposite.
fn alike() -> impl Strategy<Value = Vec<Sample>> {
    let completion =
        (vec((0..2i32, 0..=1u8), 1..3), 0..3u8).prop_map(|(tokens, role)| Completion {
            tokens,
            role,
            values: NO_VALUES,
        });
    let group = (vec(0..2i32, 1..2), vec(completion, 1..4));
    vec(
        group.prop_map(|(prompt, completions)| Sample {
            prompt,
            completions,
        }),
        0..60,
    )
}

/// What a group says, spelt out: a pair by its better and its worse answer, whatever their order.
fn content(sample: &Sample, swap: bool) -> String {
    let mut answers = sample.completions.clone();
    let roles: Vec<u8> = answers.iter().map(|one| one.role).collect();
    if roles == [0, 1] || roles == [1, 0] {
        if swap {
            for answer in &mut answers {
                answer.role = 1 - answer.role;
            }
        }
        answers.sort_by_key(|one| one.role);
    } else if swap {
        return String::new();
    }
    format!("{:?} {answers:?}", sample.prompt)
}

/// What should become of each group: the oracle is a map of what was said.
fn expected(samples: &[Sample]) -> (Vec<Outcome>, Vec<Sample>, HashMap<usize, u32>) {
    let (mut said, mut kept, mut votes) = (HashMap::new(), Vec::new(), HashMap::new());
    let outcome = |sample: &Sample| {
        if let Some(&first) = said.get(&content(sample, false)) {
            *votes.get_mut(&first).expect("kept") += 1;
            return Outcome::Duplicate(first);
        }
        let opposite = said.get(&content(sample, true)).copied();
        said.insert(content(sample, false), kept.len());
        votes.insert(kept.len(), 1);
        kept.push(sample.clone());
        opposite.map_or(Outcome::Kept, Outcome::Opposite)
    };
    let outcomes = samples.iter().map(outcome).collect();
    (outcomes, kept, votes)
}

proptest! {
    #[test]
    fn many_at_once_are_as_one_by_one(samples in samples(20), cut in 0usize..20) {
        let cut = cut.min(samples.len());
        let mut writer = StoreWriter::in_memory();
        for range in [0..cut, cut..samples.len()] {
            let outcomes = writer.push_many(&Columns::numbered(range.start, &samples[range]).bulk());
            prop_assert!(outcomes.expect("right").iter().all(|&one| one == Outcome::Kept));
        }
        assert_holds(&writer.finish("{}").expect("seals"), &samples);
    }

    #[test]
    fn duplicates_and_opposites_are_found(samples in alike(), bulk in any::<bool>()) {
        let (outcomes, kept, votes) = expected(&samples);
        let mut writer = deduplicating();
        let found = if bulk {
            writer.push_many(&Columns::of(&samples).bulk()).expect("right")
        } else {
            let one = |sample| writer.push_many(&Columns::of(std::slice::from_ref(sample)).bulk());
            samples.iter().map(one).collect::<Result<Vec<_>, _>>().expect("right").concat()
        };
        prop_assert_eq!(&found, &outcomes);
        let (groups, counted) = writer.conflicts();
        let mut opposed = Vec::new();
        let mut number = 0;
        for outcome in &outcomes {
            if let Outcome::Opposite(first) = outcome {
                opposed.push([*first as u32, number]);
            }
            number += u32::from(!matches!(outcome, Outcome::Duplicate(_)));
        }
        prop_assert_eq!(&groups, &opposed);
        let said: Vec<_> = groups.iter().map(|pair| pair.map(|one| votes[&(one as usize)])).collect();
        prop_assert_eq!(counted, said);
        let store = writer.finish("{}").expect("seals");
        prop_assert_eq!(store.len(), kept.len());
        for (group, sample) in store.groups().zip(&kept) {
            let group = group.expect("whole");
            prop_assert_eq!(group.prompt(), &sample.prompt[..]);
            let roles: Vec<u8> = sample.completions.iter().map(|one| one.role).collect();
            prop_assert_eq!(group.roles(), &roles[..]);
        }
    }

    #[test]
    fn a_selection_holds_what_was_selected(samples in samples(20), keep in vec(any::<bool>(), 20)) {
        let store = sample::store(&samples);
        let keep = &keep[..samples.len()];
        let selected = store.select(keep, None, "less").expect("selects");
        selected.verify().expect("whole");
        prop_assert_eq!(selected.metadata().expect("whole"), "less");
        let numbers: Vec<usize> = (0..samples.len()).filter(|&number| keep[number]).collect();
        prop_assert_eq!(selected.len(), numbers.len());
        let kept = numbers.iter().flat_map(|&number| &samples[number].completions);
        let values = selected.values().expect("whole");
        prop_assert_eq!(bits(values), bits(kept.map(|one| &one.values)));
        let lines = selected.lines().expect("whole");
        for ((group, &number), &line) in selected.groups().zip(&numbers).zip(lines) {
            let (group, sample) = (group.expect("whole"), &samples[number]);
            prop_assert_eq!(line, number as u64 + 1);
            prop_assert_eq!(group.prompt(), &sample.prompt[..]);
            let ids: Vec<_> = group.completions().map(|one| one.ids.to_vec()).collect();
            let expected: Vec<_> = sample.completions.iter().map(Completion::ids).collect();
            prop_assert_eq!(ids, expected);
        }
    }
}

#[test]
fn opposites_are_kept_and_counted() {
    let mut writer = deduplicating();
    let said = [
        (pair(1, 5, 6), Outcome::Kept),
        (pair(1, 6, 5), Outcome::Opposite(0)),
        (pair(1, 5, 6), Outcome::Duplicate(0)),
        (pair(1, 6, 5), Outcome::Duplicate(1)),
        (pair(1, 6, 5), Outcome::Duplicate(1)),
        (pair(2, 6, 5), Outcome::Kept),
        (pair(3, 7, 7), Outcome::Kept), // as good as itself: neither opposes the other
        (pair(3, 7, 7), Outcome::Duplicate(3)),
    ];
    for (number, (sample, expected)) in said.iter().enumerate() {
        let mut columns = Columns::of(std::slice::from_ref(sample));
        columns.lines[0] = number as u64;
        let outcome = writer.push_many(&columns.bulk()).expect("right");
        assert_eq!(outcome, [*expected]);
    }
    assert_eq!(writer.conflicts(), (vec![[0, 1]], vec![[2, 3]]));
    let lines = [0, 1, 2, 3].map(|group| writer.place(group).expect("kept").1);
    assert_eq!(lines, [0, 1, 5, 6]);
    assert!(matches!(writer.place(4), Err(Error::OutOfRange { .. })));
}

#[test]
fn one_group_is_deduplicated_as_many_are() {
    let mut writer = deduplicating();
    let group = Group {
        prompt_ids: &[1],
        completion_ids: &[2],
        completion_mask: &[1],
        completion_lengths: &[1],
        roles: &[3],
        values: &[],
        file: 0,
        line: 1,
    };
    assert_eq!(writer.push(&group).expect("right"), Outcome::Kept);
    assert_eq!(writer.push(&group).expect("right"), Outcome::Duplicate(0));
    let masked = Group {
        completion_mask: &[0],
        ..group
    };
    assert_eq!(writer.push(&masked).expect("right"), Outcome::Kept);
    assert!(writer.deduplicating().is_err(), "it holds groups");
}

/// Groups are compared by their content: the values of the first one stay.
#[test]
fn values_do_not_tell_duplicates_apart() {
    let rated = |score: f32| {
        let mut sample = pair(1, 5, 6);
        sample.completions[0].values[0] = score;
        sample
    };
    let mut writer = deduplicating();
    let outcomes = writer.push_many(&Columns::of(&[rated(1.0), rated(2.0)]).bulk());
    assert_eq!(
        outcomes.expect("right"),
        [Outcome::Kept, Outcome::Duplicate(0)]
    );
    assert_holds(&writer.finish("{}").expect("seals"), &[rated(1.0)]);
}

/// Any NaN means that there is no value, and so does a group without values.
#[test]
fn absent_values_have_the_same_bytes() {
    let mut samples = fixed(3);
    let all = samples.iter_mut().flat_map(|one| &mut one.completions);
    for completion in all {
        completion.values = NO_VALUES;
    }
    let mut columns = Columns::of(&samples);
    let sealed = |columns: &Columns| {
        let mut writer = StoreWriter::in_memory();
        writer.push_many(&columns.bulk()).expect("right");
        writer.finish("{}").expect("seals")
    };
    let expected = sealed(&columns);
    assert_holds(&expected, &samples);
    columns
        .values
        .fill([f32::from_bits(0xffc0_1234); VALUES.len()]);
    assert_eq!(sealed(&columns).digest(), expected.digest());
    columns.values.clear();
    assert_eq!(sealed(&columns).digest(), expected.digest());
}

#[test]
fn many_are_added_all_or_none() {
    let columns = Columns::of(&fixed(9));
    let mut writer = deduplicating();
    let mut refused = |change: &dyn Fn(&mut Columns)| {
        let mut columns = columns.clone();
        change(&mut columns);
        let error = writer.push_many(&columns.bulk()).expect_err("wrong");
        assert!(matches!(error, Error::Invalid(_)));
        assert_eq!(writer.len(), 0);
        error.to_string()
    };
    let last_prompt = columns.prompt_ids.len() - 1;
    let error = refused(&|columns| columns.prompt_ids[last_prompt] = -1);
    assert_eq!(error, "group 8: token id -1 is negative");
    let error = refused(&|columns| columns.roles[1] = 9);
    assert!(error.starts_with("group 1: role 9 is unknown"), "{error}");
    let error = refused(&|columns| columns.values[1][2] = f32::INFINITY);
    assert_eq!(error, "group 1: the margin of completion 0 is infinite");
    let error = refused(&|columns| columns.values.truncate(8));
    assert!(error.contains("values has 8 values"), "{error}");
    let error = refused(&|columns| columns.lines.truncate(8));
    assert!(error.contains("lines has 8 values"), "{error}");
    let error = refused(&|columns| columns.prompt_lengths[3] += 1);
    assert!(error.contains("prompt_ids has"), "{error}");
    let error = refused(&|columns| columns.group_sizes[0] = u32::MAX);
    assert!(error.contains("completion_lengths has"), "{error}");
    assert_eq!(writer.push_many(&columns.bulk()).expect("right").len(), 9);
    assert_holds(&writer.finish("{}").expect("seals"), &fixed(9));
}

/// Far more groups than a piece of the table, on disk, with places read back from both halves.
#[test]
fn a_large_table_forgets_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    let writer = StoreWriter::create(&path).expect("creates");
    let mut writer = writer.deduplicating().expect("empty");
    let many = |range: std::ops::Range<i32>| {
        let samples: Vec<_> = range.clone().map(|prompt| pair(prompt, 1, 2)).collect();
        let mut columns = Columns::of(&samples);
        columns.lines = range.map(|prompt| prompt as u64).collect();
        columns
    };
    let first = many(0..70_000);
    let kept = writer.push_many(&first.bulk()).expect("right");
    assert!(kept.iter().all(|&one| one == Outcome::Kept));
    let again = writer
        .push_many(&many(60_000..80_000).bulk())
        .expect("right");
    let duplicates = (60_000..70_000).map(Outcome::Duplicate);
    let expected: Vec<_> = duplicates
        .chain((0..10_000).map(|_| Outcome::Kept))
        .collect();
    assert_eq!(again, expected);
    for group in [0, 1, 65_535, 65_536, 79_999] {
        assert_eq!(writer.place(group).expect("kept").1, group as u64);
    }
    let store = writer.finish("{}").expect("seals");
    assert_eq!(store.len(), 80_000);
    store.verify().expect("whole");
}

#[test]
fn a_selection_on_disk_replaces_even_its_source() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    let store = sample::fill(StoreWriter::create(&path).expect("creates"), &fixed(5));
    let keep = [true, true, false, false, false];
    let selected = store.select(&keep, Some(&path), "{}").expect("selects");
    assert_holds(&selected, &fixed(2));
    assert_holds(&store, &fixed(5)); // still mapped
    assert_holds(&Store::open(&path).expect("opens"), &fixed(2));
    let error = store.select(&keep[1..], None, "{}").expect_err("too few");
    assert_eq!(error.to_string(), "keep has 4 values for 5 groups");
    assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 1);
}

#[test]
fn a_known_store_is_opened_and_no_other() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    let store = sample::fill(StoreWriter::create(&path).expect("creates"), &fixed(5));
    let digest = blake3::Hash::from_bytes(store.digest()).to_string();
    assert_holds(
        &Store::open_known(&path, &digest).expect("the same"),
        &fixed(5),
    );
    sample::fill(StoreWriter::create(&path).expect("creates"), &fixed(4));
    let error = Store::open_known(&path, &digest)
        .expect_err("another")
        .to_string();
    assert!(error.contains(&digest), "{error}");
    assert_eq!(store.path(), Some(&*path));
    assert_eq!(sample::store(&fixed(1)).path(), None::<&Path>);
}
