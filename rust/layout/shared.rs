//! The shared-prompt layout: every group once, end to end, no padding.

use super::{Sizes, Targets, gather};
use crate::{Result, store::Store};

/// One row of prompt, completion 1, …, completion K, next group, ….
///
/// The first token of every completion is predicted by the last position of its prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Token ids: `[T]`.
    pub input_ids: Vec<i64>,
    /// Position in the sequence, from the prompt's length on again for every completion: `[T]`.
    pub position_ids: Vec<i64>,
    /// What is scored; `logit_index` points into `[T]`.
    pub targets: Targets,
}

impl Shared {
    /// Lays out `groups` of `store`.
    pub fn new(store: &Store, groups: &[i64]) -> Result<Self> {
        let gathered = gather(store, groups)?;
        let sizes = Sizes::of(&gathered);
        let mut layout = Self {
            input_ids: Vec::with_capacity(sizes.tokens),
            position_ids: Vec::with_capacity(sizes.tokens),
            targets: Targets::with_room(sizes),
        };
        for (&number, group) in groups.iter().zip(gathered) {
            let prompt_length = group.prompt_length as i64;
            let prompt_end = layout.input_ids.len() as i64 + prompt_length - 1;
            let mut start = prompt_end + 1;
            layout
                .input_ids
                .extend(group.tokens.iter().map(|&id| i64::from(id)));
            layout.position_ids.extend(0..prompt_length);
            layout.targets.push_group(number, group);
            for completion in group.completions() {
                let length = completion.ids.len() as i64;
                layout
                    .position_ids
                    .extend(prompt_length..prompt_length + length);
                layout
                    .targets
                    .push_completion(completion, prompt_end, start);
                start += length;
            }
        }
        Ok(layout)
    }
}
