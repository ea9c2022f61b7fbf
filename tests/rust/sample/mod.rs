//! Random groups, and stores of them.
#![allow(dead_code)] // each test crate uses its part

use logratio::{
    group::{Group, NO_VALUES, Values},
    store::{Store, StoreWriter},
};
use proptest::{collection::vec, prelude::*};

/// One group as a test writes it down.
#[derive(Clone, Debug)]
pub struct Sample {
    pub prompt: Vec<i32>,
    pub completions: Vec<Completion>,
}

/// Ids and mask, token by token, the number of the role, and the values.
#[derive(Clone, Debug)]
pub struct Completion {
    pub tokens: Vec<(i32, u8)>,
    pub role: u8,
    pub values: Values,
}

impl Completion {
    pub fn ids(&self) -> Vec<i32> {
        self.tokens.iter().map(|&(id, _)| id).collect()
    }

    pub fn mask(&self) -> Vec<u8> {
        self.tokens.iter().map(|&(_, value)| value).collect()
    }
}

pub fn samples(most: usize) -> impl Strategy<Value = Vec<Sample>> {
    let value = prop_oneof![Just(f32::NAN), any::<i16>().prop_map(f32::from)];
    let completion = (
        vec((0..i32::MAX, 0..=1u8), 1..9),
        0..5u8,
        [value.clone(), value.clone(), value.clone(), value],
    )
        .prop_map(|(tokens, role, values)| Completion {
            tokens,
            role,
            values,
        });
    let group =
        (vec(0..i32::MAX, 1..9), vec(completion, 1..5)).prop_map(|(prompt, completions)| Sample {
            prompt,
            completions,
        });
    vec(group, 0..most)
}

/// `count` groups that are the same in every run, of rather different lengths.
pub fn fixed(count: usize) -> Vec<Sample> {
    let completion = |group: usize, number: usize| Completion {
        tokens: (0..=(group * 7 + number * 3) % 11)
            .map(|at| {
                (
                    (group * 100 + number * 10 + at) as i32,
                    u8::from(at % 4 != 1),
                )
            })
            .collect(),
        role: number as u8 % 5,
        // Some groups have values, and others none.
        values: match group % 2 {
            0 => NO_VALUES,
            _ => [
                f32::from(group as u16) / 4.0,
                f32::from(number as u16) + 1.0,
                f32::NAN,
                -0.5,
            ],
        },
    };
    (0..count)
        .map(|group| Sample {
            prompt: (0..=group * 5 % 13)
                .map(|at| (group * 31 + at) as i32)
                .collect(),
            completions: (0..=group % 3)
                .map(|number| completion(group, number))
                .collect(),
        })
        .collect()
}

pub fn push(writer: &mut StoreWriter, number: usize, sample: &Sample) {
    let flat = |of: fn(&Completion) -> Vec<i32>| -> Vec<i32> {
        sample.completions.iter().flat_map(of).collect()
    };
    let lengths: Vec<u32> = sample
        .completions
        .iter()
        .map(|completion| completion.tokens.len() as u32)
        .collect();
    let roles: Vec<u8> = sample
        .completions
        .iter()
        .map(|completion| completion.role)
        .collect();
    let mask: Vec<u8> = sample
        .completions
        .iter()
        .flat_map(Completion::mask)
        .collect();
    let values: Vec<Values> = sample.completions.iter().map(|one| one.values).collect();
    let group = Group {
        prompt_ids: &sample.prompt,
        completion_ids: &flat(Completion::ids),
        completion_mask: &mask,
        completion_lengths: &lengths,
        roles: &roles,
        values: &values,
        file: number as u32 % 3,
        line: number as u64 + 1,
    };
    writer.push(&group).expect("a sample is a group");
}

/// The bits of values, which can be compared where they are NaN.
pub fn bits<'a>(values: impl IntoIterator<Item = &'a Values>) -> Vec<[u32; 4]> {
    let bits = |values: &Values| values.map(f32::to_bits);
    values.into_iter().map(bits).collect()
}

pub fn fill(mut writer: StoreWriter, samples: &[Sample]) -> Store {
    for (number, sample) in samples.iter().enumerate() {
        push(&mut writer, number, sample);
    }
    writer.finish("{}").expect("seals")
}

pub fn store(samples: &[Sample]) -> Store {
    fill(StoreWriter::in_memory(), samples)
}

/// Whether a store has just these groups, pushed by [`fill`].
pub fn assert_holds(store: &Store, samples: &[Sample]) {
    assert_eq!(store.len(), samples.len());
    let files = store.files().expect("whole");
    let lines = store.lines().expect("whole");
    let completions = samples.iter().flat_map(|sample| &sample.completions);
    let values = store.values().expect("whole");
    assert_eq!(bits(values), bits(completions.map(|one| &one.values)));
    for (number, (group, sample)) in store.groups().zip(samples).enumerate() {
        let group = group.expect("whole");
        assert_eq!(group.prompt(), sample.prompt);
        assert_eq!(files[number], number as u32 % 3);
        assert_eq!(lines[number], number as u64 + 1);
        let found: Vec<_> = group
            .completions()
            .map(|one| (one.ids.to_vec(), one.mask.to_vec(), one.role))
            .collect();
        let expected: Vec<_> = sample
            .completions
            .iter()
            .map(|one| (one.ids(), one.mask(), one.role))
            .collect();
        assert_eq!(found, expected);
    }
}
