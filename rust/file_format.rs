//! What all files of this crate have in common: little-endian integers, alignment, checksums.
//!
//! A header ends in the CRC32C of its bytes. The data after it is covered by one CRC32C for each
//! [`BLOCK`], so that a reader checks only the blocks it reads.

use std::{
    fmt,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// Columns, blocks and values start at a multiple of this many bytes.
pub const ALIGNMENT: usize = 64;

/// Stored in every header; a file from a big-endian machine has `0x04030201` here.
pub const ENDIAN_TAG: u32 = 0x0102_0304;

/// The next multiple of [`ALIGNMENT`].
pub fn aligned(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT)
}

/// The integer at byte `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The integer at byte `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Joins `parts`, fills up with zeros and ends with the CRC32C of everything before: `length` bytes.
pub fn with_checksum(parts: &[&[u8]], length: usize) -> Vec<u8> {
    let mut bytes = parts.concat();
    debug_assert!(bytes.len() + 4 <= length, "the parts fill the header");
    bytes.resize(length - 4, 0);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Whether the last four bytes are the CRC32C of those before.
pub fn checksum_matches(bytes: &[u8]) -> bool {
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    crc32c::crc32c(body).to_le_bytes() == crc
}

/// Bytes in hexadecimal digits.
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Bytes of the file that one checksum covers.
///
/// Small enough that a first read of one group costs microseconds (about 4 µs a block), large
/// enough that the table is a 16,384th of the file; a multiple of every page size in use, and what
/// Linux reads ahead at least.
pub const BLOCK: usize = 64 << 10;

/// How many blocks `length` bytes from the start of the file touch.
pub fn block_count(length: usize) -> usize {
    length.div_ceil(BLOCK)
}

/// Checksums of a file that is written from a position on, in order.
#[derive(Clone, Debug)]
pub struct BlockCrcs {
    at: usize,
    open: u32,
    done: Vec<u32>,
}

impl BlockCrcs {
    /// The first byte will be at `at`, in block 0.
    pub fn new(at: usize) -> Self {
        Self {
            at,
            open: 0,
            done: Vec::new(),
        }
    }

    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = BLOCK - self.at % BLOCK;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.open = crc32c::crc32c_append(self.open, now);
            self.at += now.len();
            if now.len() == room {
                self.done.push(std::mem::take(&mut self.open));
            }
            bytes = later;
        }
    }

    /// The table, with the last block as far as it was filled.
    pub fn finish(mut self) -> Vec<u8> {
        if !self.at.is_multiple_of(BLOCK) {
            self.done.push(self.open);
        }
        self.done.into_iter().flat_map(u32::to_le_bytes).collect()
    }
}

/// Which blocks matched their checksums.
///
/// Two threads may check a block at the same time, which costs time only: a bit is set
/// after its block matched, is never cleared, and the file does not change. A forked child has a copy
/// of the bits.
#[derive(Debug)]
pub struct CheckedBlocks(Box<[AtomicU64]>);

impl CheckedBlocks {
    /// None yet, of `blocks`.
    pub fn new(blocks: usize) -> Self {
        let words = blocks.div_ceil(64);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    pub fn contains(&self, block: usize) -> bool {
        self.0[block / 64].load(Ordering::Relaxed) >> (block % 64) & 1 == 1
    }

    pub fn insert(&self, block: usize) {
        self.0[block / 64].fetch_or(1 << (block % 64), Ordering::Relaxed);
    }
}

/// Which blocks of a map were compared with their checksums.
#[derive(Debug)]
pub struct Blocks {
    data: Range<usize>,
    /// Where the checksums are.
    table: usize,
    whole: CheckedBlocks,
}

impl Blocks {
    /// Blocks of the bytes `data`, whose checksums begin at `table` in the same file.
    pub fn new(data: Range<usize>, table: usize) -> Self {
        let whole = CheckedBlocks::new(block_count(data.end));
        Self { data, table, whole }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        block_count(self.data.end)
    }

    /// The bytes of a block.
    pub fn range(&self, block: usize) -> Range<usize> {
        let start = (block * BLOCK).max(self.data.start);
        start..((block + 1) * BLOCK).min(self.data.end)
    }

    /// Compares the blocks of `range` that were not compared before; the error is the number of the
    /// first that does not match.
    pub fn ensure(&self, file: &[u8], range: &Range<usize>) -> Result<(), usize> {
        if range.is_empty() {
            return Ok(());
        }
        for block in range.start / BLOCK..=(range.end - 1) / BLOCK {
            if !self.whole.contains(block) && !self.check(file, block) {
                return Err(block);
            }
        }
        Ok(())
    }

    /// Compares one block, even if it matched before; true if it matches.
    #[cold]
    pub fn check(&self, file: &[u8], block: usize) -> bool {
        let whole =
            crc32c::crc32c(&file[self.range(block)]) == u32_at(file, self.table + 4 * block);
        if whole {
            self.whole.insert(block);
        }
        whole
    }
}
