//! Header, columns, table and footer of a store: `FORMAT.md` in code.

use std::{ops::Range, path::Path};

use super::{
    blocks,
    columns::{Column, Counts},
};
use crate::{
    Error, Result,
    wire::{self, aligned, u32_at, u64_at},
};

pub const MAGIC: &[u8; 8] = b"LRSTORE2";
pub const VERSION: u32 = 2;
pub const HEADER: usize = 128;
pub const FOOTER: usize = 64;

const FIRST_MAGIC: &[u8; 8] = b"LRSTORE1";
const VERSION_AT: usize = MAGIC.len();
const ENDIAN_AT: usize = VERSION_AT + 4;
const COUNTS_AT: usize = ENDIAN_AT + 4;
const LENGTH_AT: usize = COUNTS_AT + 5 * 8;
const DIGEST_AT: usize = LENGTH_AT + 8;

const BLOCKS_AT: usize = 32;
const TABLE_CRC_AT: usize = BLOCKS_AT + 8;

/// Where everything lies, by the counts alone.
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
            end = range.end.checked_next_multiple_of(wire::ALIGNMENT)?;
        }
        let table = aligned(4 * blocks::count(end));
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
pub fn header(counts: Counts, length: usize, digest: &[u8; 32]) -> Vec<u8> {
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
    let (version, endian) = (VERSION.to_le_bytes(), wire::ENDIAN_TAG.to_le_bytes());
    let parts = [
        &MAGIC[..],
        &version,
        &endian,
        numbers.as_flattened(),
        digest,
    ];
    wire::signed(&parts, HEADER)
}

/// The file's last 64 bytes, after `table`, which ends at a multiple of 64.
pub fn footer(digest: &[u8; 32], blocks: usize, table: &[u8]) -> Vec<u8> {
    let (blocks, crc) = (
        (blocks as u64).to_le_bytes(),
        crc32c::crc32c(table).to_le_bytes(),
    );
    wire::signed(&[digest, &blocks, &crc], FOOTER)
}

/// What header and footer say.
#[derive(Debug)]
pub struct Frame {
    pub counts: Counts,
    pub digest: [u8; 32],
    pub places: Places,
}

impl Frame {
    /// Checks header, footer, sizes and table, in the order in which they explain a failure best.
    pub fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
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
            counts,
            digest: digest.try_into().expect("32 bytes"),
            places,
        })
    }
}

fn check_header(bytes: &[u8]) -> std::result::Result<&[u8], String> {
    let length = bytes.len();
    if bytes.starts_with(FIRST_MAGIC) {
        return Err("format version 1 is no longer read: build the store again".into());
    }
    if length < HEADER + FOOTER {
        return Err(format!("{length} bytes are too few for header and footer"));
    }
    if !bytes.starts_with(MAGIC) {
        return Err("it does not begin with LRSTORE2".into());
    }
    let header = &bytes[..HEADER];
    if u32_at(header, ENDIAN_AT) == wire::ENDIAN_TAG.swap_bytes() {
        return Err("it was written on a big-endian machine".into());
    }
    if !wire::is_signed(header) {
        return Err("the header's checksum does not match".into());
    }
    let version = u32_at(header, VERSION_AT);
    if version != VERSION {
        return Err(format!(
            "format version {version}, this library reads {VERSION}"
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
    let (expected, found) = (blocks::count(places.data.end), u64_at(footer, BLOCKS_AT));
    if !wire::is_signed(footer) {
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
