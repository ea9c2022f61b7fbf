//! The padded layout: one row a completion, for models whose state runs through the tokens.

use super::{Sizes, Targets, gather};
use crate::{
    Result,
    store::{Store, StoredGroup},
};

/// Right-padded rows of prompt and completion, completion-major: completion 0 of every group, then
/// completion 1 of every group that has one, ….
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Padded {
    /// Number of rows, one a completion.
    pub rows: usize,
    /// Tokens of the longest row.
    pub width: usize,
    /// Token ids, 0 in padding: `[N·T]`.
    pub input_ids: Vec<i64>,
    /// 1 on tokens, 0 in padding: `[N·T]`.
    pub attention_mask: Vec<i64>,
    /// Position in the row, 0 in padding: `[N·T]`.
    pub position_ids: Vec<i64>,
    /// What is scored; `logit_index` points into `[N·T]`.
    pub targets: Targets,
}

impl Padded {
    /// Lays out `groups` of `store`.
    pub fn new(store: &Store, groups: &[i64]) -> Result<Self> {
        let gathered = gather(store, groups)?;
        let sizes = Sizes::of(&gathered);
        let (rows, width) = (sizes.completions, sizes.longest);
        let mut layout = Self {
            rows,
            width,
            input_ids: vec![0; rows * width],
            attention_mask: vec![0; rows * width],
            position_ids: vec![0; rows * width],
            targets: Targets::with_room(sizes),
        };
        let mut next = first_rows(&gathered);
        for (&number, group) in groups.iter().zip(gathered) {
            layout.targets.push_group(number, group);
            for (completion, row) in group.completions().zip(&mut next) {
                let start = *row * width;
                let completion_start = start + group.prompt_length;
                layout.fill(start, group.prompt(), 0);
                layout.fill(completion_start, completion.ids, group.prompt_length as i64);
                let (prompt_end, start) = (completion_start as i64 - 1, completion_start as i64);
                layout
                    .targets
                    .push_completion(completion, prompt_end, start);
                *row += 1;
            }
        }
        Ok(layout)
    }

    fn fill(&mut self, at: usize, ids: &[i32], position: i64) {
        let range = at..at + ids.len();
        let inputs = self.input_ids[range.clone()].iter_mut();
        inputs
            .zip(ids)
            .for_each(|(input, &id)| *input = i64::from(id));
        self.attention_mask[range.clone()].fill(1);
        self.position_ids[range]
            .iter_mut()
            .zip(position..)
            .for_each(|(slot, at)| *slot = at);
    }
}

/// The row of the first completion 0, of the first completion 1, ….
fn first_rows(groups: &[StoredGroup<'_>]) -> Vec<usize> {
    let most = groups
        .iter()
        .map(|group| group.roles().len())
        .max()
        .unwrap_or(0);
    let mut counts = vec![0; most + 1];
    for group in groups {
        counts[1..=group.roles().len()]
            .iter_mut()
            .for_each(|count| *count += 1);
    }
    for number in 1..=most {
        counts[number] += counts[number - 1];
    }
    counts
}
