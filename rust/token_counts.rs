//! Which tokens a store uses, and how its completions begin and end.

use crate::{
    Result, parallel,
    store::{Store, StoredGroup},
};

const COUNTED: usize = 1 << 22; // ids; the largest vocabularies have a quarter of that

/// Counts over every token of a store, each prompt once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenCounts {
    /// How often each id occurs in a prompt or a completion: `[V]`, V = largest counted id + 1.
    pub uses: Vec<u64>,
    /// How many completions each id ends: `[V]`.
    pub ends: Vec<u64>,
    /// Tokens whose id is 2^22 or above, which no vocabulary has.
    pub beyond: u64,
    /// Groups of two completions or more.
    pub compared: u64,
    /// Of these, groups whose completions all begin with one token.
    pub same_start: u64,
    /// Tokens that all completions of a compared group begin with, added up.
    pub common: u64,
}

impl TokenCounts {
    /// Counts a store on `threads` threads.
    pub fn of(store: &Store, threads: usize) -> Result<Self> {
        let share = store.len().div_ceil(threads.max(1)).max(1);
        let starts = (0..store.len()).step_by(share).collect();
        let parts = parallel::each(starts, |start: usize| {
            let mut part = Self::default();
            for index in start..(start + share).min(store.len()) {
                part.add(store.group(index as i64)?);
            }
            Ok(part)
        });
        let mut whole = Self::default();
        for part in parts {
            whole.merge(&part?);
        }
        let used = whole.uses.iter().rposition(|&uses| uses > 0);
        let length = used.map_or(0, |last| last + 1);
        whole.uses.truncate(length);
        whole.ends.resize(length, 0);
        Ok(whole)
    }

    fn add(&mut self, group: StoredGroup<'_>) {
        for &id in group.tokens {
            if !count(&mut self.uses, id) {
                self.beyond += 1;
            }
        }
        for completion in group.completions() {
            count(&mut self.ends, completion.ids[completion.ids.len() - 1]);
        }
        if group.completions().len() > 1 {
            let common = common(group);
            self.compared += 1;
            self.same_start += u64::from(common > 0);
            self.common += common as u64;
        }
    }

    fn merge(&mut self, other: &Self) {
        sum(&mut self.uses, &other.uses);
        sum(&mut self.ends, &other.ends);
        self.beyond += other.beyond;
        self.compared += other.compared;
        self.same_start += other.same_start;
        self.common += other.common;
    }
}

/// Tokens that all completions of a group begin with.
fn common(group: StoredGroup<'_>) -> usize {
    let Some(first) = group.completions().next() else {
        return 0;
    };
    let agree = |ids: &[i32]| {
        first
            .ids
            .iter()
            .zip(ids)
            .take_while(|(a, b)| a == b)
            .count()
    };
    let others = group.completions().skip(1);
    others.map(|other| agree(other.ids)).min().unwrap_or(0)
}

/// Counts an id, which a store never holds below 0; false where it is none of a vocabulary.
fn count(counts: &mut Vec<u64>, id: i32) -> bool {
    let id = id.cast_unsigned() as usize;
    if id >= COUNTED {
        return false;
    }
    if id >= counts.len() {
        counts.resize((id + 1).next_power_of_two(), 0);
    }
    counts[id] += 1;
    true
}

fn sum(counts: &mut Vec<u64>, more: &[u64]) {
    counts.resize(counts.len().max(more.len()), 0);
    counts.iter_mut().zip(more).for_each(|(to, add)| *to += add);
}
