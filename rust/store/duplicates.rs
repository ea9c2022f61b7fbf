//! Which groups were written before, and which pairs have chosen and rejected exchanged.

use blake3::Hasher;
use hashbrown::{HashTable, hash_table::Entry};

use crate::{
    Error, Result,
    group::{Group, Role},
};

/// The table grows a shard at a time, so that never more than a 256th of it exists twice.
const SHARDS: usize = 256;
/// Values in one piece of a [`Pieces`].
const PIECE: usize = 1 << 16;
const PAIR: [u8; 2] = [Role::Chosen as u8, Role::Rejected as u8];

/// What became of a group that was pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has the next number.
    Kept,
    /// It was left out: this group is equal to it.
    Duplicate(usize),
    /// It has the next number. This group has the same prompt and answers, with chosen and rejected
    /// exchanged.
    Opposite(usize),
}

/// 128-bit hash of what a group holds. Never stored in a file.
///
/// For a pair, the lowest bit is set by which of its answers is the chosen one; the other bits are
/// equal for the pair with chosen and rejected exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupKey(u128);

impl GroupKey {
    /// Hashes the prompt's ids and every completion's role, ids and mask.
    pub fn of(group: &Group<'_>) -> Self {
        let answers = answers(group);
        let mut hasher = Hasher::new();
        hasher.update(&(group.prompt_ids.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(group.prompt_ids));
        let chosen = group.roles.iter().position(|&role| role == PAIR[0]);
        let rejected = group.roles.iter().position(|&role| role == PAIR[1]);
        let mut swapped = false;
        if let (2, Some(chosen), Some(rejected)) = (group.roles.len(), chosen, rejected) {
            let (chosen, rejected) = (answers[chosen], answers[rejected]);
            swapped = rejected < chosen;
            hasher.update(&chosen.min(rejected));
            hasher.update(&chosen.max(rejected));
        } else {
            for (role, answer) in group.roles.iter().zip(&answers) {
                hasher.update(&[*role]);
                hasher.update(answer);
            }
        }
        let hash = hasher.finalize();
        let half = hash.as_bytes()[..16].try_into().expect("16 of 32 bytes");
        Self(u128::from_le_bytes(half) & !1 | u128::from(swapped))
    }

    fn opposite(self) -> Self {
        Self(self.0 ^ 1)
    }

    fn shard(self) -> usize {
        (self.0 >> 120) as usize % SHARDS
    }

    /// The same for opposites, so that both are found in one place.
    fn hash(self) -> u64 {
        (self.0 >> 1) as u64
    }
}

fn answers(group: &Group<'_>) -> Vec<[u8; 32]> {
    let mut start = 0;
    let lengths = group.completion_lengths.iter();
    let hash = |&length: &u32| {
        let range = start..start + length as usize;
        start = range.end;
        let mut hasher = Hasher::new();
        hasher.update(bytemuck::cast_slice(&group.completion_ids[range.clone()]));
        hasher.update(&group.completion_mask[range]);
        hasher.finalize().into()
    };
    lengths.map(hash).collect()
}

/// A list that grows without being copied.
#[derive(Debug)]
struct Pieces<T>(Vec<Vec<T>>);

impl<T: Copy> Pieces<T> {
    fn len(&self) -> usize {
        self.0
            .last()
            .map_or(0, |last| (self.0.len() - 1) * PIECE + last.len())
    }

    fn push(&mut self, value: T) {
        if self.len().is_multiple_of(PIECE) {
            self.0.push(Vec::with_capacity(PIECE));
        }
        self.0.last_mut().expect("one with room").push(value);
    }

    fn get(&self, index: usize) -> T {
        self.0[index / PIECE][index % PIECE]
    }

    fn get_mut(&mut self, index: usize) -> &mut T {
        &mut self.0[index / PIECE][index % PIECE]
    }
}

/// The key of every group kept, and how often each was pushed.
///
/// About 20 bytes a group for key and votes, and 6 to 11 for its number in the table.
#[derive(Debug)]
pub struct Duplicates {
    shards: Vec<HashTable<u32>>,
    keys: Pieces<u128>,
    votes: Pieces<u32>,
    conflicts: Vec<[u32; 2]>,
}

impl Duplicates {
    pub fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| HashTable::new()).collect(),
            keys: Pieces(Vec::new()),
            votes: Pieces(Vec::new()),
            conflicts: Vec::new(),
        }
    }

    /// Refuses `more` groups where their numbers could leave 32 bits.
    pub fn check_room(&self, more: usize) -> Result<()> {
        if self.keys.len() + more > u32::MAX as usize {
            let reason = "a deduplicating writer takes at most 2^32-1 groups";
            return Err(Error::Invalid(reason.into()));
        }
        Ok(())
    }

    /// Takes the next group, after [`Duplicates::check_room`].
    pub fn push(&mut self, key: GroupKey) -> Outcome {
        let number = self.keys.len() as u32;
        let keys = &self.keys;
        let at = |&group: &u32| GroupKey(keys.get(group as usize));
        let shard = &mut self.shards[key.shard()];
        let opposite = shard
            .find(key.hash(), |group| at(group) == key.opposite())
            .copied();
        let same = |group: &u32| at(group) == key;
        match shard.entry(key.hash(), same, |group| at(group).hash()) {
            Entry::Occupied(found) => {
                let first = *found.get() as usize;
                self.vote(first);
                return Outcome::Duplicate(first);
            }
            Entry::Vacant(free) => free.insert(number),
        };
        self.keys.push(key.0);
        self.votes.push(1);
        opposite.map_or(Outcome::Kept, |first| {
            self.conflicts.push([first, number]);
            Outcome::Opposite(first as usize)
        })
    }

    /// Counts one more group that is equal to group `number`.
    pub fn vote(&mut self, number: usize) {
        let votes = self.votes.get_mut(number);
        *votes = votes.saturating_add(1);
    }

    /// Pairs of groups with chosen and rejected exchanged, the earlier one first.
    pub fn conflicts(&self) -> &[[u32; 2]] {
        &self.conflicts
    }

    /// How often the groups of each conflict were pushed.
    pub fn conflict_votes(&self) -> Vec<[u32; 2]> {
        let votes = |pair: &[u32; 2]| pair.map(|group| self.votes.get(group as usize));
        self.conflicts.iter().map(votes).collect()
    }
}
