//! The columns of a store: their order, their sizes, and how anything is read from them.

use std::ops::Range;

use bytemuck::Pod;

use super::format::HEADER;
use crate::{Error, Result};

/// The columns in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    Tokens,
    Mask,
    PromptOffsets,
    CompletionOffsets,
    GroupOffsets,
    Roles,
    Files,
    Lines,
    Metadata,
}

impl Column {
    pub const ALL: [Self; 9] = [
        Self::Tokens,
        Self::Mask,
        Self::PromptOffsets,
        Self::CompletionOffsets,
        Self::GroupOffsets,
        Self::Roles,
        Self::Files,
        Self::Lines,
        Self::Metadata,
    ];

    /// The columns that the digest covers and a writer spools: all but the metadata.
    pub const HASHED: usize = Self::ALL.len() - 1;

    /// The name of its file while a writer spools it, and in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Mask => "mask",
            Self::PromptOffsets => "prompt_offsets",
            Self::CompletionOffsets => "completion_offsets",
            Self::GroupOffsets => "group_offsets",
            Self::Roles => "roles",
            Self::Files => "files",
            Self::Lines => "lines",
            Self::Metadata => "metadata",
        }
    }

    /// What the column holds before the first group: the offsets begin with 0.
    pub fn start(self) -> &'static [u8] {
        match self {
            Self::PromptOffsets | Self::CompletionOffsets | Self::GroupOffsets => &[0; 8],
            _ => &[],
        }
    }

    /// Bytes before it in its spool: the others, and the header, are written around the first.
    pub fn room(self) -> usize {
        if self == Self::Tokens { HEADER } else { 0 }
    }

    fn width(self) -> usize {
        match self {
            Self::Mask | Self::Roles | Self::Metadata => 1,
            Self::Tokens | Self::Files => 4,
            _ => 8,
        }
    }
}

/// How many of everything a store holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub groups: usize,
    pub completions: usize,
    pub tokens: usize,
    pub completion_tokens: usize,
    /// Bytes of text.
    pub metadata: usize,
}

impl Counts {
    /// Tokens of all prompts.
    pub fn prompt_tokens(self) -> usize {
        self.tokens - self.completion_tokens
    }

    /// Whether groups of at least one completion, and parts of at least one token, can add up so.
    pub fn are_possible(self) -> bool {
        let prompts = self.tokens.checked_sub(self.completion_tokens);
        self.groups <= self.completions
            && self.completions <= self.completion_tokens
            && prompts.is_some_and(|prompts| self.groups <= prompts)
            && (self.groups > 0 || self.tokens == 0)
    }

    /// Values in `column`.
    fn items(self, column: Column) -> Option<usize> {
        match column {
            Column::Tokens => Some(self.tokens),
            Column::Mask => Some(self.completion_tokens),
            Column::PromptOffsets | Column::GroupOffsets => self.groups.checked_add(1),
            Column::CompletionOffsets => self.completions.checked_add(1),
            Column::Roles => Some(self.completions),
            Column::Files | Column::Lines => Some(self.groups),
            Column::Metadata => Some(self.metadata),
        }
    }

    /// Bytes of `column`; `None` where no machine could hold them.
    pub fn bytes(self, column: Column) -> Option<usize> {
        self.items(column)?.checked_mul(column.width())
    }
}

/// Columns that can be read: those of a store, or those that a writer left.
pub trait Columns {
    fn counts(&self) -> Counts;

    /// Values `items` of a column, or [`Error::CorruptStore`].
    fn read<T: Pod>(&self, column: Column, items: Range<usize>) -> Result<&[T]>;

    /// The error that names this store.
    fn corrupt(&self, reason: String) -> Error;

    /// A whole column of offsets, which rise from 0 to their total.
    fn offsets(&self, column: Column) -> Result<&[u64]> {
        let counts = self.counts();
        let (items, total) = match column {
            Column::PromptOffsets => (counts.groups, counts.prompt_tokens()),
            Column::CompletionOffsets => (counts.completions, counts.completion_tokens),
            _ => (counts.groups, counts.completions),
        };
        let offsets = self.read::<u64>(column, 0..items + 1)?;
        if offsets[0] == 0 && rise(offsets) && offsets[items] == total as u64 {
            return Ok(offsets);
        }
        let name = column.name();
        Err(self.corrupt(format!("{name} do not rise from 0 to {total}")))
    }
}

/// Whether every step is a length that is allowed: 1 to 2³²−1.
pub fn rise(offsets: &[u64]) -> bool {
    let allowed = |pair: &[u64]| {
        let step = pair[1].wrapping_sub(pair[0]);
        pair[0] < pair[1] && u32::try_from(step).is_ok()
    };
    offsets.windows(2).all(allowed)
}
