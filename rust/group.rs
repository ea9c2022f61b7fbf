//! One prompt and its K completions, as the tokenizer hands them over, and how much they take up.

use std::str::FromStr;

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

/// What data may say about a completion in numbers; a value's place in [`Values`] is its index.
pub const VALUES: [&str; 4] = ["score", "rank", "margin", "weight"];

/// The values of one completion, in the order of [`VALUES`]; NaN where it has no such value.
pub type Values = [f32; VALUES.len()];

/// A completion without values.
pub const NO_VALUES: Values = [f32::NAN; VALUES.len()];

/// A group to be stored: borrowed ids, completions end to end.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// Ids of the prompt: at least one.
    pub prompt_ids: &'a [i32],
    /// Ids of completion 1, completion 2, …
    pub completion_ids: &'a [i32],
    /// 1 where a completion's token counts, else 0; or the number of its weight, from 2.
    pub completion_mask: &'a [u8],
    /// Tokens of each completion: at least one.
    pub completion_lengths: &'a [u32],
    /// [`Role`] of each completion.
    pub roles: &'a [u8],
    /// [`Values`] of each completion, finite or NaN; empty where none has any.
    pub values: &'a [Values],
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
        } else if let Some(role) = self
            .roles
            .iter()
            .find(|&&role| role as usize >= ROLES.len())
        {
            format!("role {role} is unknown: there are {}", ROLES.len())
        } else {
            return self.check_values();
        };
        Err(Error::Invalid(reason))
    }

    fn check_values(&self) -> Result<()> {
        let (found, expected) = (self.values.len(), self.completion_lengths.len());
        if found != expected && found > 0 {
            let reason = format!("values of {found} completions, but there are {expected}");
            return Err(Error::Invalid(reason));
        }
        let flat = self.values.as_flattened();
        match flat.iter().position(|value| value.is_infinite()) {
            None => Ok(()),
            Some(at) => {
                let (number, name) = (at / VALUES.len(), VALUES[at % VALUES.len()]);
                let reason = format!("the {name} of completion {number} is infinite");
                Err(Error::Invalid(reason))
            }
        }
    }
}

/// What a micro-batch pays for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Every token once, prompts once a group.
    Shared,
    /// Every beginning that groups share once: see [`crate::prefix_tree`].
    Tree,
    /// Rows times the longest row.
    Padded,
}

/// Work is counted in 1/1024 of a token: integers add up to the same sum in every order.
const PARTS: f64 = 1024.0;

/// What a group, or a micro-batch of groups, takes up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Tokens, each prompt once.
    pub tokens: u32,
    /// Completions.
    pub rows: u32,
    /// Tokens of the longest prompt with one of its completions.
    pub longest: u32,
    /// Token pairs that attend, each prompt once: every token to itself and to what it sees.
    pub pairs: u64,
}

impl Shape {
    /// The shape of a group with a prompt of `prompt` tokens and completions of these lengths.
    pub fn new(prompt: usize, completions: impl Iterator<Item = u32>) -> Self {
        let (prompt, mut shape) = (prompt as u32, Self::default());
        shape.add(0, prompt);
        for length in completions {
            shape.rows += 1;
            shape.add(prompt, length);
        }
        shape
    }

    /// Adds `own` tokens that see `before` tokens and themselves. A damaged store may hold numbers
    /// that no group has: they saturate.
    fn add(&mut self, before: u32, own: u32) {
        self.tokens = self.tokens.saturating_add(own);
        self.longest = self.longest.max(before.saturating_add(own));
        let (before, own) = (u64::from(before), u64::from(own));
        let pairs = (before * own).saturating_add(own * (own + 1) / 2);
        self.pairs = self.pairs.saturating_add(pairs);
    }

    /// What of the token budget a group takes up alone.
    pub(crate) fn size(self, layout: Layout) -> u64 {
        match layout {
            Layout::Shared | Layout::Tree => u64::from(self.tokens),
            Layout::Padded => u64::from(self.rows) * u64::from(self.longest),
        }
    }

    /// What groups of similar length have in common.
    pub(crate) fn length(self, layout: Layout) -> u32 {
        match layout {
            Layout::Shared | Layout::Tree => self.tokens,
            Layout::Padded => self.longest,
        }
    }

    /// Estimated work, in 1/1024 of a token's: a token costs 1 and a pair that attends
    /// `attention_cost`.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "an estimate, of nothing below zero"
    )]
    pub(crate) fn work(self, layout: Layout, attention_cost: f64) -> u64 {
        let longest = u64::from(self.longest);
        let pairs = match layout {
            Layout::Shared | Layout::Tree => self.pairs,
            Layout::Padded => u64::from(self.rows) * (longest * (longest + 1) / 2),
        };
        (PARTS * (self.size(layout) as f64 + attention_cost * pairs as f64)) as u64
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "shared" => Ok(Self::Shared),
            "tree" => Ok(Self::Tree),
            "padded" => Ok(Self::Padded),
            _ => Err(Error::Invalid(format!(
                "layout must be shared, tree or padded, not {name:?}"
            ))),
        }
    }
}
