//! One group as it lies in the columns.

use std::ops::Range;

use super::columns::{Column, Columns, rise};
use crate::{
    Result,
    group::{Group, ROLES},
};

/// One group of a store, borrowed from its columns.
#[derive(Clone, Copy, Debug)]
pub struct StoredGroup<'a> {
    /// Prompt, completion 1, completion 2, … as they lie in the store.
    pub tokens: &'a [i32],
    /// Length of the prompt.
    pub prompt_length: usize,
    /// Row number of the first completion.
    pub first: usize,
    offsets: &'a [u64],
    mask: &'a [u8],
    roles: &'a [u8],
}

/// One completion of a store.
#[derive(Clone, Copy, Debug)]
pub struct StoredCompletion<'a> {
    /// Token ids.
    pub ids: &'a [i32],
    /// 1 where a token counts.
    pub mask: &'a [u8],
    /// Number of its role.
    pub role: u8,
}

/// The group at `index`, which must be below the number of groups.
///
/// Offsets are believed only after they were compared with each other and with their totals, so
/// that those of a forged file lead nowhere.
pub fn stored(columns: &impl Columns, index: usize) -> Result<StoredGroup<'_>> {
    let prompts = columns.read::<u64>(Column::PromptOffsets, index..index + 2)?;
    let groups = columns.read::<u64>(Column::GroupOffsets, index..index + 2)?;
    let counts = columns.counts();
    let forged = || columns.corrupt(format!("the offsets of group {index} are impossible"));
    if !rise(groups) || groups[1] > counts.completions as u64 {
        return Err(forged());
    }
    let (first, last) = (groups[0] as usize, groups[1] as usize);
    let offsets = columns.read::<u64>(Column::CompletionOffsets, first..last + 1)?;
    let (start, end) = (offsets[0], offsets[last - first]);
    let inside = rise(prompts)
        && rise(offsets)
        && prompts[1] <= counts.prompt_tokens() as u64
        && end <= counts.completion_tokens as u64;
    let begins = index > 0 || [prompts[0], groups[0], start] == [0; 3];
    let totals = [
        counts.prompt_tokens(),
        counts.completions,
        counts.completion_tokens,
    ];
    let ends =
        index + 1 < counts.groups || [prompts[1], groups[1], end] == totals.map(|n| n as u64);
    if !(inside && begins && ends) {
        return Err(forged());
    }
    let tokens = (prompts[0] + start) as usize..(prompts[1] + end) as usize;
    Ok(StoredGroup {
        tokens: columns.read(Column::Tokens, tokens)?,
        prompt_length: (prompts[1] - prompts[0]) as usize,
        first,
        offsets,
        mask: columns.read(Column::Mask, start as usize..end as usize)?,
        roles: known_roles(columns, first..last)?,
    })
}

/// The roles of some completions, all of which have a name.
pub fn known_roles(columns: &impl Columns, items: Range<usize>) -> Result<&[u8]> {
    let roles: &[u8] = columns.read(Column::Roles, items)?;
    let unknown = roles.iter().find(|&&role| usize::from(role) >= ROLES.len());
    match unknown {
        Some(role) => Err(columns.corrupt(format!("role {role} is unknown"))),
        None => Ok(roles),
    }
}

impl<'a> StoredGroup<'a> {
    /// Ids of the prompt.
    pub fn prompt(self) -> &'a [i32] {
        &self.tokens[..self.prompt_length]
    }

    /// Number of the role of each completion.
    pub fn roles(self) -> &'a [u8] {
        self.roles
    }

    /// Tokens of each completion.
    pub fn lengths(self) -> impl ExactSizeIterator<Item = u32> {
        steps(self.offsets)
    }

    /// The completions in order.
    pub fn completions(self) -> impl ExactSizeIterator<Item = StoredCompletion<'a>> {
        let ids = &self.tokens[self.prompt_length..];
        let base = self.offsets[0] as usize;
        self.offsets
            .windows(2)
            .zip(self.roles)
            .map(move |(pair, &role)| {
                let range = pair[0] as usize - base..pair[1] as usize - base;
                StoredCompletion {
                    ids: &ids[range.clone()],
                    mask: &self.mask[range],
                    role,
                }
            })
    }

    /// The same group as a writer takes it; `lengths` is room for its completions' lengths.
    pub(super) fn to_push<'b>(self, lengths: &'b mut Vec<u32>, file: u32, line: u64) -> Group<'b>
    where
        'a: 'b,
    {
        lengths.clear();
        lengths.extend(self.lengths());
        Group {
            prompt_ids: self.prompt(),
            completion_ids: &self.tokens[self.prompt_length..],
            completion_mask: self.mask,
            completion_lengths: lengths,
            roles: self.roles,
            file,
            line,
        }
    }
}

/// The lengths between offsets that rise.
pub fn steps(offsets: &[u64]) -> impl ExactSizeIterator<Item = u32> {
    offsets.windows(2).map(|pair| (pair[1] - pair[0]) as u32)
}
