//! One prompt and its K completions, as the tokenizer hands them over.

use crate::{Error, Result};

/// What a completion is to its prompt. Stored as its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// The better answer of a pair.
    Chosen,
    /// The worse answer of a pair.
    Rejected,
    /// One of N answers to be ranked.
    Candidate,
    /// An answer to imitate.
    Demonstration,
    /// Another prompt's answer: the reference point of KTO.
    Mismatched,
}

/// The name of every role; a role's number is its index.
pub const ROLES: [&str; 5] = [
    "chosen",
    "rejected",
    "candidate",
    "demonstration",
    "mismatched",
];

/// A group to be stored: borrowed ids, completions end to end.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// Ids of the prompt: at least one.
    pub prompt_ids: &'a [i32],
    /// Ids of completion 1, completion 2, …
    pub completion_ids: &'a [i32],
    /// 1 where a completion's token counts, else 0.
    pub completion_mask: &'a [u8],
    /// Tokens of each completion: at least one.
    pub completion_lengths: &'a [u32],
    /// [`Role`] of each completion.
    pub roles: &'a [u8],
    /// Number of the source file.
    pub file: u32,
    /// Line in the source file.
    pub line: u64,
}

impl Group<'_> {
    /// Says what is wrong with this group, if anything.
    pub fn check(&self) -> Result<()> {
        let total: u64 = self.completion_lengths.iter().copied().map(u64::from).sum();
        let ids = self.completion_ids.len();
        let negative = self
            .prompt_ids
            .iter()
            .chain(self.completion_ids)
            .find(|&&id| id < 0);
        let reason = if self.prompt_ids.is_empty() {
            "the prompt is empty".into()
        } else if self.completion_lengths.is_empty() {
            "the group has no completion".into()
        } else if let Some(empty) = self
            .completion_lengths
            .iter()
            .position(|&length| length == 0)
        {
            format!("completion {empty} is empty")
        } else if total != ids as u64 || self.completion_mask.len() != ids {
            let masks = self.completion_mask.len();
            format!(
                "completion lengths add up to {total}, but there are {ids} ids and {masks} mask values"
            )
        } else if ids + self.prompt_ids.len() > u32::MAX as usize {
            "the group has more than 2^32-1 tokens".into()
        } else if self.roles.len() != self.completion_lengths.len() {
            format!(
                "{} roles for {} completions",
                self.roles.len(),
                self.completion_lengths.len()
            )
        } else if let Some(id) = negative {
            format!("token id {id} is negative")
        } else if let Some(value) = self.completion_mask.iter().find(|&&value| value > 1) {
            format!("completion_mask holds {value}, not 0 or 1")
        } else if let Some(role) = self
            .roles
            .iter()
            .find(|&&role| role as usize >= ROLES.len())
        {
            format!("role {role} is unknown: there are {}", ROLES.len())
        } else {
            return Ok(());
        };
        Err(Error::Invalid(reason))
    }
}
