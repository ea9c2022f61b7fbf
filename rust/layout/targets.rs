//! The groups of a batch, and what is scored of them, group by group: equal in every layout.

use crate::{
    Result,
    store::{Store, StoredCompletion, StoredGroup},
};

/// Groups of a store, found and measured.
#[derive(Debug)]
pub(super) struct BatchGroups<'a> {
    pub numbers: &'a [i64],
    pub groups: Vec<StoredGroup<'a>>,
    /// Of every group, in flat group-major order.
    pub completions: Vec<StoredCompletion<'a>>,
    pub sizes: Sizes,
}

/// How much there is in a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    pub completions: usize,
    /// Tokens, each prompt once.
    pub tokens: usize,
    pub targets: usize,
    /// Tokens of the longest prompt with one of its completions.
    pub longest: usize,
    /// Keys that each prompt and each completion sees, added up.
    pub keys: usize,
    /// Most tokens of a prompt or a completion.
    pub most_queries: usize,
}

impl Sizes {
    fn of(groups: &[StoredGroup<'_>], completions: &[StoredCompletion<'_>]) -> Self {
        let (mut sizes, mut rest) = (Self::default(), completions);
        for group in groups {
            let (prompt, count) = (group.prompt_length, group.roles().len());
            sizes.completions += count;
            sizes.tokens += group.tokens.len();
            sizes.targets += group.tokens.len() - prompt;
            sizes.keys += group.tokens.len() + count * prompt;
            let own;
            (own, rest) = rest.split_at(count);
            for completion in own {
                let length = completion.ids.len();
                sizes.longest = sizes.longest.max(prompt + length);
                sizes.most_queries = sizes.most_queries.max(prompt).max(length);
            }
        }
        sizes
    }
}

impl<'a> BatchGroups<'a> {
    /// Finds `numbers` in `store`.
    pub(super) fn find(store: &'a Store, numbers: &'a [i64]) -> Result<Self> {
        store.warm(numbers);
        let groups = numbers.iter().map(|&number| store.group(number));
        let groups: Vec<_> = groups.collect::<Result<_>>()?;
        let completions = groups.iter().flat_map(|group| group.completions());
        let completions: Vec<_> = completions.collect();
        let sizes = Sizes::of(&groups, &completions);
        Ok(Self {
            numbers,
            groups,
            completions,
            sizes,
        })
    }

    /// Every group with its completions.
    pub(super) fn grouped(
        &self,
    ) -> impl Iterator<Item = (StoredGroup<'a>, &[StoredCompletion<'a>])> {
        self.groups
            .iter()
            .scan(&self.completions[..], |rest, &group| {
                let (own, after) = rest.split_at(group.roles().len());
                *rest = after;
                Some((group, own))
            })
    }

    pub(super) fn target_ids(&self, mut out: &mut [i64]) {
        for group in &self.groups {
            widen(
                take(&mut out, group.tokens.len() - group.prompt_length),
                &group.tokens[group.prompt_length..],
            );
        }
    }

    pub(super) fn completion_mask(&self, mut out: &mut [u8]) {
        for completion in &self.completions {
            let values = take(&mut out, completion.mask.len());
            // Whatever else a damaged file may hold, a bool is 0 or 1.
            for (slot, &value) in values.iter_mut().zip(completion.mask) {
                *slot = u8::from(value != 0);
            }
        }
    }

    pub(super) fn completion_of(&self, mut out: &mut [i64]) {
        for (number, completion) in (0..).zip(&self.completions) {
            take(&mut out, completion.ids.len()).fill(number);
        }
    }

    pub(super) fn completion_offsets(&self, out: &mut [i64]) {
        let mut end = 0;
        out[0] = 0;
        for (slot, completion) in out[1..].iter_mut().zip(&self.completions) {
            end += completion.ids.len() as i64;
            *slot = end;
        }
    }

    pub(super) fn prompt_lengths(&self, out: &mut [i64]) {
        for (slot, group) in out.iter_mut().zip(&self.groups) {
            *slot = group.prompt_length as i64;
        }
    }

    pub(super) fn completion_lengths(&self, out: &mut [i64]) {
        for (slot, completion) in out.iter_mut().zip(&self.completions) {
            *slot = completion.ids.len() as i64;
        }
    }

    pub(super) fn group_sizes(&self, out: &mut [i64]) {
        for (slot, group) in out.iter_mut().zip(&self.groups) {
            *slot = group.roles().len() as i64;
        }
    }

    pub(super) fn roles(&self, mut out: &mut [u8]) {
        for group in &self.groups {
            take(&mut out, group.roles().len()).copy_from_slice(group.roles());
        }
    }

    pub(super) fn completions(&self, mut out: &mut [i64]) {
        for group in &self.groups {
            count(take(&mut out, group.roles().len()), group.first as i64);
        }
    }
}

/// The next `length` elements of `out`.
#[expect(clippy::mut_mut, reason = "`out` itself moves on")]
pub(super) fn take<'a, T>(out: &mut &'a mut [T], length: usize) -> &'a mut [T] {
    let (part, rest) = std::mem::take(out).split_at_mut(length);
    *out = rest;
    part
}

/// Ids as the 64-bit numbers that models index with.
pub(super) fn widen(out: &mut [i64], ids: &[i32]) {
    for (slot, &id) in out.iter_mut().zip(ids) {
        *slot = i64::from(id);
    }
}

/// `first`, `first + 1`, ….
pub(super) fn count(out: &mut [i64], first: i64) {
    for (slot, number) in out.iter_mut().zip(first..) {
        *slot = number;
    }
}

/// The bytes of a mask as numbers.
pub(super) fn widen_mask(out: &mut [i64], mask: &[u8]) {
    for (slot, &value) in out.iter_mut().zip(mask) {
        *slot = i64::from(value != 0);
    }
}
