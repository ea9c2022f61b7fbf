//! The bytes of a store (`FORMAT.md` in code): header, columns, table of checksums, footer.

use std::{ops::Range, path::Path};

use bytemuck::Pod;

use crate::{
    Error, Result,
    file_format::{
        ALIGNMENT, ENDIAN_TAG, aligned, block_count, checksum_matches, u32_at, u64_at,
        with_checksum,
    },
    group::Values,
};

/// The magic of every version, without the digit of the version.
const NAME: &[u8; 7] = b"LRSTORE";
/// Of a store whose mask is 0 or 1.
pub const PLAIN: u32 = 3;
/// Of a store whose mask numbers weights, too: see [`Store::mask`](super::reader::Store::mask).
pub const WEIGHTED: u32 = 4;
pub const HEADER: usize = 128;
pub const FOOTER: usize = 64;

const VERSION_AT: usize = NAME.len() + 1;
const ENDIAN_AT: usize = VERSION_AT + 4;
const COUNTS_AT: usize = ENDIAN_AT + 4;
const LENGTH_AT: usize = COUNTS_AT + 5 * 8;
const DIGEST_AT: usize = LENGTH_AT + 8;

const BLOCKS_AT: usize = 32;
const TABLE_CRC_AT: usize = BLOCKS_AT + 8;

/// The columns in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    Tokens,
    Mask,
    PromptOffsets,
    CompletionOffsets,
    GroupOffsets,
    Roles,
    Values,
    Files,
    Lines,
    Metadata,
}

impl Column {
    pub const ALL: [Self; 10] = [
        Self::Tokens,
        Self::Mask,
        Self::PromptOffsets,
        Self::CompletionOffsets,
        Self::GroupOffsets,
        Self::Roles,
        Self::Values,
        Self::Files,
        Self::Lines,
        Self::Metadata,
    ];

    /// The columns that the digest covers and a writer writes to files: all but the metadata.
    pub const HASHED: usize = Self::ALL.len() - 1;

    /// The name of its file while a writer writes to files it, and in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Mask => "mask",
            Self::PromptOffsets => "prompt_offsets",
            Self::CompletionOffsets => "completion_offsets",
            Self::GroupOffsets => "group_offsets",
            Self::Roles => "roles",
            Self::Values => "values",
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

    /// Bytes before it in its file: the others, and the header, are written around the first.
    pub fn room(self) -> usize {
        if self == Self::Tokens { HEADER } else { 0 }
    }

    fn width(self) -> usize {
        match self {
            Self::Mask | Self::Roles | Self::Metadata => 1,
            Self::Tokens | Self::Files => 4,
            Self::Values => size_of::<Values>(),
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
            Column::Roles | Column::Values => Some(self.completions),
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

    /// A complete column of offsets, which rise from 0 to their total.
    fn offsets(&self, column: Column) -> Result<&[u64]> {
        let counts = self.counts();
        let (items, total) = match column {
            Column::PromptOffsets => (counts.groups, counts.prompt_tokens()),
            Column::CompletionOffsets => (counts.completions, counts.completion_tokens),
            _ => (counts.groups, counts.completions),
        };
        let offsets = self.read::<u64>(column, 0..items + 1)?;
        if offsets[0] == 0 && is_rising(offsets) && offsets[items] == total as u64 {
            return Ok(offsets);
        }
        let name = column.name();
        Err(self.corrupt(format!("{name} do not rise from 0 to {total}")))
    }
}

/// Whether every step is a length that is allowed: 1 to 2³²−1.
pub fn is_rising(offsets: &[u64]) -> bool {
    let allowed = |pair: &[u64]| {
        let step = pair[1].wrapping_sub(pair[0]);
        pair[0] < pair[1] && u32::try_from(step).is_ok()
    };
    offsets.windows(2).all(allowed)
}

/// Where every part begins and ends, which follows from the counts.
#[derive(Debug, PartialEq, Eq)]
pub struct Places {
    pub columns: [Range<usize>; Column::ALL.len()],
    /// Header's end to table: what the blocks cover.
    pub data: Range<usize>,
    /// The blocks' checksums, up to the footer.
    pub table: Range<usize>,
}

impl Places {
    /// `None` where no file could be that long.
    pub fn of(counts: Counts) -> Option<Self> {
        let mut columns = [const { 0..0 }; Column::ALL.len()];
        let mut end = HEADER;
        for (range, column) in columns.iter_mut().zip(Column::ALL) {
            let start = end;
            *range = start..start.checked_add(counts.bytes(column)?)?;
            end = range.end.checked_next_multiple_of(ALIGNMENT)?;
        }
        let table = aligned(4 * block_count(end));
        Some(Self {
            columns,
            data: HEADER..end,
            table: end..end.checked_add(table)?,
        })
    }

    /// Bytes of the file.
    pub fn length(&self) -> Option<usize> {
        self.table.end.checked_add(FOOTER)
    }
}

/// The file's first 128 bytes.
pub fn header(version: u32, counts: Counts, length: usize, digest: &[u8; 32]) -> Vec<u8> {
    let Counts {
        groups,
        completions,
        tokens,
        completion_tokens,
        metadata,
    } = counts;
    let numbers = [
        groups,
        completions,
        tokens,
        completion_tokens,
        metadata,
        length,
    ];
    let numbers = numbers.map(|number| (number as u64).to_le_bytes());
    let digit = [b'0' + version as u8];
    let (version, endian) = (version.to_le_bytes(), ENDIAN_TAG.to_le_bytes());
    let parts = [
        &NAME[..],
        &digit,
        &version,
        &endian,
        numbers.as_flattened(),
        digest,
    ];
    with_checksum(&parts, HEADER)
}

/// The file's last 64 bytes, after `table`, which ends at a multiple of 64.
pub fn footer(digest: &[u8; 32], blocks: usize, table: &[u8]) -> Vec<u8> {
    let (blocks, crc) = (
        (blocks as u64).to_le_bytes(),
        crc32c::crc32c(table).to_le_bytes(),
    );
    with_checksum(&[digest, &blocks, &crc], FOOTER)
}

/// The header and footer, decoded.
#[derive(Debug)]
pub struct Frame {
    pub version: u32,
    pub counts: Counts,
    pub digest: [u8; 32],
    pub places: Places,
}

impl Frame {
    /// Checks header, footer, sizes and table, in the order in which they explain a failure best.
    pub fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        if let Some(found) = other_version(bytes) {
            return Err(Error::StoreVersion {
                path: path.into(),
                found,
                read: WEIGHTED,
            });
        }
        Self::of(bytes).map_err(|reason| Error::store(path, reason))
    }

    fn of(bytes: &[u8]) -> std::result::Result<Self, String> {
        let header = check_header(bytes)?;
        let count = |field: usize| u64_at(header, COUNTS_AT + 8 * field) as usize;
        let counts = Counts {
            groups: count(0),
            completions: count(1),
            tokens: count(2),
            completion_tokens: count(3),
            metadata: count(4),
        };
        let fits = |places: &Places| places.length() == Some(bytes.len());
        let places = Places::of(counts).filter(|places| counts.are_possible() && fits(places));
        let places = places.ok_or(format!("{counts:?} do not fit in {} bytes", bytes.len()))?;
        let digest = &header[DIGEST_AT..DIGEST_AT + 32];
        check_footer(bytes, digest, &places)?;
        Ok(Self {
            version: u32_at(header, VERSION_AT),
            counts,
            digest: digest.try_into().expect("32 bytes"),
            places,
        })
    }
}

/// The version of a store that another version of this library wrote: the last byte of its magic.
fn other_version(bytes: &[u8]) -> Option<u32> {
    let version = named_version(bytes)?;
    (!(PLAIN..=WEIGHTED).contains(&version)).then_some(version)
}

/// The last byte of a store's magic.
fn named_version(bytes: &[u8]) -> Option<u32> {
    let digit = *bytes.strip_prefix(NAME)?.first()?;
    char::from(digit).to_digit(10)
}

fn check_header(bytes: &[u8]) -> std::result::Result<&[u8], String> {
    let length = bytes.len();
    if length < HEADER + FOOTER {
        return Err(format!("{length} bytes are too few for header and footer"));
    }
    let Some(named) = named_version(bytes) else {
        return Err("it does not begin with LRSTORE3 or LRSTORE4".into());
    };
    let header = &bytes[..HEADER];
    if u32_at(header, ENDIAN_AT) == ENDIAN_TAG.swap_bytes() {
        return Err("it was written on a big-endian machine".into());
    }
    if !checksum_matches(header) {
        return Err("the header's checksum does not match".into());
    }
    let version = u32_at(header, VERSION_AT);
    if version != named {
        return Err(format!(
            "format version {version}, but it begins with LRSTORE{named}"
        ));
    }
    let expected = u64_at(header, LENGTH_AT);
    if expected != length as u64 {
        return Err(format!("expected {expected} bytes, found {length}"));
    }
    Ok(header)
}

fn check_footer(bytes: &[u8], digest: &[u8], places: &Places) -> std::result::Result<(), String> {
    let footer = &bytes[places.table.end..];
    let (expected, found) = (block_count(places.data.end), u64_at(footer, BLOCKS_AT));
    if !checksum_matches(footer) {
        Err("the footer's checksum does not match".into())
    } else if !footer.starts_with(digest) {
        Err("header and footer belong to different stores".into())
    } else if found != expected as u64 {
        Err(format!(
            "expected checksums of {expected} blocks, found {found}"
        ))
    } else if crc32c::crc32c(&bytes[places.table.clone()]) != u32_at(footer, TABLE_CRC_AT) {
        Err("the checksum of the blocks' checksums does not match".into())
    } else {
        Ok(())
    }
}
