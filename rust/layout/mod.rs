//! Groups as the flat arrays that a model reads.
//!
//! Both training layouts describe the same conditionals: target `s` is token
//! [`Targets::target_ids`]`[s]`, predicted at [`Targets::logit_index`]`[s]`, and targets always
//! come group by group, completion by completion, whatever the order of the rows.

mod candidates;
mod padded;
mod shared;

pub use candidates::Candidates;
pub use padded::Padded;
pub use shared::Shared;

use crate::{
    Result,
    store::{Store, StoredCompletion, StoredGroup},
};

/// What is scored, in flat group-major order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// Tokens of each prompt: `[G]`.
    pub prompt_lengths: Vec<i64>,
    /// Tokens of each completion: `[N]`.
    pub completion_lengths: Vec<i64>,
    /// Completions of each group: `[G]`.
    pub group_sizes: Vec<i64>,
    /// Flat position whose hidden state predicts each target: `[S]`.
    pub logit_index: Vec<i64>,
    /// Token to predict: `[S]`.
    pub target_ids: Vec<i64>,
    /// Whether a target counts: `[S]`.
    pub completion_mask: Vec<bool>,
    /// Where the targets of each completion begin, and their number: `[N+1]`.
    pub completion_offsets: Vec<i64>,
    /// Number of the role of each completion: `[N]`.
    pub roles: Vec<u8>,
    /// Number of each group in the store: `[G]`.
    pub groups: Vec<i64>,
    /// Row number of each completion in the store: `[N]`.
    pub completions: Vec<i64>,
}

/// How much room a batch needs.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    groups: usize,
    completions: usize,
    tokens: usize,
    targets: usize,
    longest: usize,
}

impl Sizes {
    fn of(groups: &[StoredGroup<'_>]) -> Self {
        let mut sizes = Self {
            groups: groups.len(),
            ..Self::default()
        };
        for group in groups {
            let longest = group
                .completions()
                .map(|completion| completion.ids.len())
                .max();
            sizes.completions += group.roles().len();
            sizes.tokens += group.tokens.len();
            sizes.targets += group.tokens.len() - group.prompt_length;
            sizes.longest = sizes
                .longest
                .max(group.prompt_length + longest.unwrap_or(0));
        }
        sizes
    }
}

impl Targets {
    fn with_room(sizes: Sizes) -> Self {
        let Sizes {
            groups,
            completions,
            targets,
            ..
        } = sizes;
        let mut room = Self {
            prompt_lengths: Vec::with_capacity(groups),
            completion_lengths: Vec::with_capacity(completions),
            group_sizes: Vec::with_capacity(groups),
            logit_index: Vec::with_capacity(targets),
            target_ids: Vec::with_capacity(targets),
            completion_mask: Vec::with_capacity(targets),
            completion_offsets: Vec::with_capacity(completions + 1),
            roles: Vec::with_capacity(completions),
            groups: Vec::with_capacity(groups),
            completions: Vec::with_capacity(completions),
        };
        room.completion_offsets.push(0);
        room
    }

    fn push_group(&mut self, number: i64, group: StoredGroup<'_>) {
        let size = group.roles().len();
        self.groups.push(number);
        self.prompt_lengths.push(group.prompt_length as i64);
        self.group_sizes.push(size as i64);
        self.roles.extend_from_slice(group.roles());
        self.completions
            .extend((group.first..group.first + size).map(|row| row as i64));
    }

    /// Adds a completion whose prompt ends at `prompt_end` and whose own ids lie from `start` on.
    fn push_completion(&mut self, completion: StoredCompletion<'_>, prompt_end: i64, start: i64) {
        let length = completion.ids.len() as i64;
        self.completion_lengths.push(length);
        self.logit_index.push(prompt_end);
        self.logit_index.extend(start..start + length - 1);
        self.target_ids
            .extend(completion.ids.iter().map(|&id| i64::from(id)));
        self.completion_mask
            .extend(completion.mask.iter().map(|&value| value != 0));
        self.completion_offsets.push(self.target_ids.len() as i64);
    }
}

fn gather<'a>(store: &'a Store, groups: &[i64]) -> Result<Vec<StoredGroup<'a>>> {
    groups.iter().map(|&group| store.group(group)).collect()
}
