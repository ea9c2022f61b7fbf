//! Header, columns and footer of a store: `FORMAT.md` in code.

use std::{ops::Range, path::Path};

use crate::{
    Error, Result,
    wire::{self, aligned, u32_at, u64_at},
};

pub const MAGIC: &[u8; 8] = b"LRSTORE1";
pub const VERSION: u32 = 1;
pub const HEADER: usize = 64;
pub const FOOTER: usize = 80;

const VERSION_AT: usize = MAGIC.len();
const ENDIAN_AT: usize = VERSION_AT + 4;
const COUNTS_AT: usize = ENDIAN_AT + 4;
const LENGTH_AT: usize = COUNTS_AT + 4 * 8;

const DIGEST_AT: usize = 8;
const CRCS_AT: usize = DIGEST_AT + 32;

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

    /// What the column holds before the first group: the offsets begin with 0.
    pub fn start(self) -> &'static [u8] {
        match self {
            Self::PromptOffsets | Self::CompletionOffsets | Self::GroupOffsets => &[0; 8],
            _ => &[],
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
}

/// The file's first 64 bytes.
pub fn header(counts: Counts, file_length: usize) -> Vec<u8> {
    let Counts {
        groups,
        completions,
        tokens,
        completion_tokens,
    } = counts;
    let numbers = [groups, completions, tokens, completion_tokens, file_length];
    let numbers = numbers.map(|number| (number as u64).to_le_bytes());
    let (version, endian) = (VERSION.to_le_bytes(), wire::ENDIAN_TAG.to_le_bytes());
    wire::signed(&[MAGIC, &version, &endian, numbers.as_flattened()], HEADER)
}

/// The file's last 80 bytes.
#[derive(Clone, Debug)]
pub struct Footer {
    pub metadata: usize,
    pub digest: [u8; 32],
    pub crcs: [u32; Column::ALL.len()],
}

impl Footer {
    pub fn encode(&self) -> Vec<u8> {
        let metadata = (self.metadata as u64).to_le_bytes();
        let crcs = self.crcs.map(u32::to_le_bytes);
        wire::signed(&[&metadata, &self.digest, crcs.as_flattened()], FOOTER)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        wire::is_signed(bytes).then(|| Self {
            metadata: u64_at(bytes, 0) as usize,
            digest: bytes[DIGEST_AT..CRCS_AT].try_into().expect("32 bytes"),
            crcs: std::array::from_fn(|column| u32_at(bytes, CRCS_AT + 4 * column)),
        })
    }
}

/// Where every column lies; `None` where the counts do not fit in `length` bytes.
fn columns(counts: Counts, metadata: usize, length: usize) -> Option<[Range<usize>; 9]> {
    let Counts {
        groups,
        completions,
        tokens,
        completion_tokens,
    } = counts;
    let sizes = [
        (tokens, 4),
        (completion_tokens, 1),
        (groups.checked_add(1)?, 8),
        (completions.checked_add(1)?, 8),
        (groups.checked_add(1)?, 8),
        (completions, 1),
        (groups, 4),
        (groups, 8),
        (metadata, 1),
    ];
    let mut ranges = [const { 0..0 }; 9];
    let mut end = HEADER;
    for (range, (count, size)) in ranges.iter_mut().zip(sizes) {
        let start = aligned(end);
        end = start.checked_add(count.checked_mul(size)?)?;
        (end <= length).then_some(())?;
        *range = start..end;
    }
    (aligned(end) + FOOTER == length).then_some(ranges)
}

/// What header and footer say.
#[derive(Debug)]
pub struct Frame {
    pub counts: Counts,
    pub footer: Footer,
    pub columns: [Range<usize>; 9],
}

impl Frame {
    /// Checks header, footer and sizes, in the order in which they explain a failure best.
    pub fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        let corrupt = |reason: String| Err(Error::store(path, reason));
        let length = bytes.len();
        if length < HEADER + FOOTER {
            return corrupt(format!("{length} bytes are too few for header and footer"));
        }
        if !bytes.starts_with(MAGIC) {
            return corrupt("it does not begin with LRSTORE1".into());
        }
        if u32_at(bytes, ENDIAN_AT) == wire::ENDIAN_TAG.swap_bytes() {
            return corrupt("it was written on a big-endian machine".into());
        }
        if !wire::is_signed(&bytes[..HEADER]) {
            return corrupt("the header's checksum does not match".into());
        }
        let version = u32_at(bytes, VERSION_AT);
        if version != VERSION {
            return corrupt(format!(
                "format version {version}, this library reads {VERSION}"
            ));
        }
        let expected = u64_at(bytes, LENGTH_AT);
        if expected != length as u64 {
            return corrupt(format!("expected {expected} bytes, found {length}"));
        }
        let Some(footer) = Footer::decode(&bytes[length - FOOTER..]) else {
            return corrupt("the footer's checksum does not match".into());
        };
        let count = |field: usize| u64_at(bytes, COUNTS_AT + 8 * field) as usize;
        let counts = Counts {
            groups: count(0),
            completions: count(1),
            tokens: count(2),
            completion_tokens: count(3),
        };
        match columns(counts, footer.metadata, length) {
            Some(columns) => Ok(Self {
                counts,
                footer,
                columns,
            }),
            None => corrupt(format!("{counts:?} do not fit in {length} bytes")),
        }
    }
}
