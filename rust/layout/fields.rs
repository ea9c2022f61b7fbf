//! What a caller asks for: the options of a layout, its arrays, and where each is in the one buffer.

use std::str::FromStr;

use crate::{Error, Result, group::Layout};

/// Where the padding of a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Before its tokens.
    Left,
    /// After its tokens.
    Right,
}

/// How to lay out a batch.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// One row of groups end to end, one row of their tree, or one row a completion.
    pub layout: Layout,
    /// Where the padding of the padded layout is.
    pub side: Side,
    /// The width `T` is rounded up to a multiple of this.
    pub multiple_of: usize,
    /// The width `T` is this, whatever the batch.
    pub width: Option<usize>,
    /// The id in padding.
    pub pad_id: i32,
    /// The arrays to lay out; none: those of [`Field::defaults`].
    pub fields: &'a [Field],
}

impl Options<'_> {
    /// As training needs it: right-padded with 0, as wide as the batch needs.
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            side: Side::Right,
            multiple_of: 1,
            width: None,
            pad_id: 0,
            fields: &[],
        }
    }

    /// The width of a batch that needs `needed` tokens in its longest row.
    pub(super) fn width(&self, needed: usize) -> Result<usize> {
        let width = match (self.width, self.multiple_of) {
            (_, 0) => return Err(Error::Invalid("multiple_of must be at least 1".into())),
            (Some(width), multiple) => width.next_multiple_of(multiple),
            (None, multiple) => needed.next_multiple_of(multiple),
        };
        if width < needed {
            let reason = format!("a row of {needed} tokens does not fit in a width of {width}");
            return Err(Error::Invalid(reason));
        }
        Ok(width)
    }
}

impl FromStr for Side {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "left" => Ok(Self::Left),
            "right" => Ok(Self::Right),
            _ => Err(Error::Invalid(format!(
                "side must be left or right, not {name:?}"
            ))),
        }
    }
}

/// The type of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// Signed 64-bit integers.
    Int64,
    /// Signed 32-bit integers.
    Int32,
    /// One byte, 0 or 1.
    Bool,
    /// Unsigned bytes.
    Uint8,
}

/// One array of a batch: `G` groups of `N` completions with `S` tokens to predict, in `T` tokens
/// (shared: `[T]`, padded: `[N, T]`), as `Q` sequences of queries that see `K` keys in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Token ids, `pad_id` in padding: `[T]` or `[N, T]`.
    InputIds,
    /// 1 on tokens, 0 in padding: `[T]` or `[N, T]`.
    AttentionMask,
    /// Position in the sequence, from the prompt's length on again for every completion, 0 in
    /// padding: `[T]` or `[N, T]`.
    PositionIds,
    /// 1 on completion tokens that count: `[T]` or `[N, T]`. Not of a tree, where a token may be one
    /// group's prompt and another's completion.
    TokenMask,
    /// 0 in padding. Shared: the number of the token's sequence, from 1 on: `[T]`. Padded: 1 in the
    /// prompt, 2 in the completion: `[N, T]`.
    SegmentIds,
    /// Flat position whose hidden state predicts each target: `[S]`.
    LogitIndex,
    /// Token to predict: `[S]`.
    TargetIds,
    /// Whether a target counts: `[S]`.
    CompletionMask,
    /// Number of the completion that each target belongs to: `[S]`.
    CompletionOf,
    /// Where the targets of each completion begin, and their number: `[N+1]`.
    CompletionOffsets,
    /// Tokens of each prompt: `[G]`.
    PromptLengths,
    /// Tokens of each completion: `[N]`.
    CompletionLengths,
    /// Completions of each group: `[G]`.
    GroupSizes,
    /// Number of the role of each completion: `[N]`.
    Roles,
    /// Number of each group in the store: `[G]`.
    Groups,
    /// Row number of each completion in the store: `[N]`.
    Completions,
    /// Where the queries of each sequence begin in `T`, and `T`: `[Q+1]`. A prompt is a sequence,
    /// each of its completions another, what fills up to a fixed width the last. In a tree: what each
    /// sequence of a prompt and a completion adds to those before it. Not padded.
    CuSeqlensQ,
    /// Where the keys of each sequence begin in `key_index`, and `K`: `[Q+1]`. Not padded.
    CuSeqlensK,
    /// Token of each key: `[K]`. A prompt's own; a completion's: its prompt's, then its own, so that
    /// causal attention aligned at the end is right. In a tree: all that come before its own, then
    /// its own. Not padded.
    KeyIndex,
    /// Most queries and most keys of a sequence: `[2]`. Not padded.
    MaxSeqlens,
}

impl Field {
    /// Every array, in the order of the buffer.
    pub const ALL: [Self; 20] = [
        Self::InputIds,
        Self::AttentionMask,
        Self::PositionIds,
        Self::TokenMask,
        Self::SegmentIds,
        Self::LogitIndex,
        Self::TargetIds,
        Self::CompletionMask,
        Self::CompletionOf,
        Self::CompletionOffsets,
        Self::PromptLengths,
        Self::CompletionLengths,
        Self::GroupSizes,
        Self::Roles,
        Self::Groups,
        Self::Completions,
        Self::CuSeqlensQ,
        Self::CuSeqlensK,
        Self::KeyIndex,
        Self::MaxSeqlens,
    ];

    /// As Python spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::InputIds => "input_ids",
            Self::AttentionMask => "attention_mask",
            Self::PositionIds => "position_ids",
            Self::TokenMask => "token_mask",
            Self::SegmentIds => "segment_ids",
            Self::LogitIndex => "logit_index",
            Self::TargetIds => "target_ids",
            Self::CompletionMask => "completion_mask",
            Self::CompletionOf => "completion_of",
            Self::CompletionOffsets => "completion_offsets",
            Self::PromptLengths => "prompt_lengths",
            Self::CompletionLengths => "completion_lengths",
            Self::GroupSizes => "group_sizes",
            Self::Roles => "roles",
            Self::Groups => "groups",
            Self::Completions => "completions",
            Self::CuSeqlensQ => "cu_seqlens_q",
            Self::CuSeqlensK => "cu_seqlens_k",
            Self::KeyIndex => "key_index",
            Self::MaxSeqlens => "max_seqlens",
        }
    }

    /// The type of its elements.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::CuSeqlensQ | Self::CuSeqlensK => Dtype::Int32,
            Self::CompletionMask => Dtype::Bool,
            Self::Roles => Dtype::Uint8,
            _ => Dtype::Int64,
        }
    }

    /// Whether a layout has it.
    pub fn is_in(self, layout: Layout) -> bool {
        match layout {
            Layout::Shared => true,
            Layout::Tree => self != Self::TokenMask,
            Layout::Padded => !self.is_of_sequences(),
        }
    }

    fn is_of_sequences(self) -> bool {
        matches!(
            self,
            Self::CuSeqlensQ | Self::CuSeqlensK | Self::KeyIndex | Self::MaxSeqlens
        )
    }

    /// The arrays that are laid out by default: what training reads.
    pub fn defaults(layout: Layout) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |&field| match field {
            Self::TokenMask | Self::SegmentIds | Self::MaxSeqlens => false,
            Self::AttentionMask => layout == Layout::Padded,
            _ => layout == Layout::Tree || !field.is_of_sequences(),
        })
    }
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Int64 => 8,
            Self::Int32 => 4,
            Self::Bool | Self::Uint8 => 1,
        }
    }

    /// As numpy spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int64 => "int64",
            Self::Int32 => "int32",
            Self::Bool => "bool",
            Self::Uint8 => "uint8",
        }
    }
}

impl FromStr for Field {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|field| field.name() == name);
        found.ok_or_else(|| Error::Invalid(format!("no layout has an array {name:?}")))
    }
}

/// Arrays begin at multiples of this many bytes: a cache line, and enough for every device.
const ALIGNMENT: usize = 64;

/// Where one array is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which array.
    pub field: Field,
    /// Its first byte.
    pub offset: usize,
    /// Its rows, if it is a matrix.
    pub rows: Option<usize>,
    /// Its elements, or those of a row.
    pub width: usize,
}

/// The arrays of a batch, in the order of the buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Entry {
    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.field.dtype()
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.rows.unwrap_or(1) * self.width * self.dtype().size()
    }
}

impl Table {
    pub(super) fn push(&mut self, field: Field, rows: Option<usize>, width: usize) {
        let entry = Entry {
            field,
            offset: self.bytes,
            rows,
            width,
        };
        self.bytes = (entry.offset + entry.bytes()).next_multiple_of(ALIGNMENT);
        self.entries.push(entry);
    }

    /// Every array.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Where an array is, if it was laid out.
    pub fn get(&self, field: Field) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.field == field)
    }

    /// Bytes that all arrays take up together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Cuts a buffer into the arrays' bytes.
    pub(super) fn split<'a>(&self, arena: &'a mut [u8]) -> Result<Vec<(Field, &'a mut [u8])>> {
        let (found, needed) = (arena.len(), self.bytes);
        if found < needed {
            let reason = format!("the batch needs {needed} bytes and the buffer has {found}");
            return Err(Error::Invalid(reason));
        }
        if !(arena.as_ptr() as usize).is_multiple_of(size_of::<i64>()) {
            let reason = "the buffer must begin at a multiple of 8 bytes";
            return Err(Error::Invalid(reason.into()));
        }
        let (mut rest, mut at, mut parts) = (arena, 0, Vec::with_capacity(self.entries.len()));
        for entry in &self.entries {
            let (part, after) = rest[entry.offset - at..].split_at_mut(entry.bytes());
            parts.push((entry.field, part));
            (rest, at) = (after, entry.offset + entry.bytes());
        }
        Ok(parts)
    }
}
