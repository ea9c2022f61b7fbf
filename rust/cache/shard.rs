//! A sealed shard: an Arrow IPC file whose blocks are compared with their checksums at first read.

use std::{
    hint::black_box,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    disk::{FileBytes, ReadMode},
    folder::{Cache, Span, ValueKind},
    shard_format::{self, Batch},
};
use crate::{
    Error, Result,
    content_key::Key,
    file_format::{BLOCK, CheckedBlocks, block_count, u32_at},
};

/// An open shard. Rows are numbered in the order of their keys.
#[derive(Debug)]
pub struct Shard {
    file: CheckedFile,
    kind: ValueKind,
    batches: Vec<Batch>,
    /// Number of the first row of each batch, and of all rows at last.
    starts: Vec<u64>,
    pub tokens: u64,
    /// Bytes of the file.
    pub length: u64,
    /// CRC32C of the tail, which no other shard's has.
    pub seal: u32,
}

impl Shard {
    /// Opens a shard of this cache, which was written with `expected` bytes; the seal and the footer
    /// are checked now, blocks as they are read.
    pub fn open(cache: &Cache, path: PathBuf, expected: u64, mode: ReadMode) -> Result<Self> {
        let file = cache.disk.open(&path).map_err(Error::io(&path))?;
        let length = file.length().map_err(Error::io(&path))?;
        if length != expected {
            let reason = format!("it has {length} bytes, and {expected} were written");
            return Err(Error::cache(&path, reason));
        }
        let bytes = FileBytes::new(file, mode);
        let found = shard_format::read(cache, &path, &bytes, length as usize)?;
        Ok(Self {
            kind: cache.kind,
            batches: found.batches,
            starts: found.starts,
            tokens: found.tokens,
            length,
            seal: found.crc,
            file: CheckedFile::new(path, bytes, found.data, found.crcs),
        })
    }

    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Compares every block with its checksum.
    pub fn check_blocks(&self) -> Result<()> {
        (0..self.file.blocks()).try_for_each(|block| self.file.check(block))
    }

    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.starts[self.batches.len()]
    }

    /// A row's batch, and its number there.
    fn place(&self, row: u64) -> (&Batch, usize) {
        let batch = self.starts.partition_point(|&start| start <= row) - 1;
        (&self.batches[batch], (row - self.starts[batch]) as usize)
    }

    pub fn key(&self, row: u64) -> Result<Key> {
        let (batch, index) = self.place(row);
        let mut key = [0; 32];
        self.file
            .read(batch.keys_at as usize + 32 * index, &mut key)?;
        Ok(key)
    }

    /// Where a row's values are.
    pub fn span(&self, row: u64) -> Result<Span> {
        let (batch, index) = self.place(row);
        let (first, tokens) = match self.kind {
            ValueKind::PerToken => self.offsets(batch, index)?,
            ValueKind::Sums => (index, self.count(batch, index)?),
        };
        let (width, length) = (self.kind.width(), self.kind.bytes(tokens));
        if (first + length / width) as u64 > batch.values {
            let reason = format!("row {row} ends outside its batch");
            return Err(Error::cache(&self.file.path, reason));
        }
        let at = batch.values_at + (first * width) as u64;
        Ok(Span { at, tokens })
    }

    /// The first value of a row within its batch, and how many there are.
    fn offsets(&self, batch: &Batch, index: usize) -> Result<(usize, u32)> {
        let at = batch.tokens_at as usize + 4 * index;
        let mut bytes = [0; 8];
        self.file.read(at, &mut bytes)?;
        let (start, end) = (u32_at(&bytes, 0), u32_at(&bytes, 4));
        let backwards = || {
            let reason = format!("the offsets at byte {at} run backwards");
            Error::cache(&self.file.path, reason)
        };
        Ok((
            start as usize,
            end.checked_sub(start).ok_or_else(backwards)?,
        ))
    }

    fn count(&self, batch: &Batch, index: usize) -> Result<u32> {
        let mut bytes = [0; 4];
        self.file
            .read(batch.tokens_at as usize + 4 * index, &mut bytes)?;
        Ok(u32_at(&bytes, 0))
    }

    /// Touches what [`Self::span`] will read.
    pub fn touch_span(&self, row: u64) {
        let (batch, index) = self.place(row);
        let at = batch.tokens_at as usize + 4 * index;
        self.file.touch(at..at + 1);
    }

    /// Touches what [`Self::fill`] will read.
    pub fn touch_values(&self, span: Span) {
        let at = span.at as usize;
        self.file.touch(at..at + self.kind.bytes(span.tokens));
    }

    /// Fills `out` with a row's values.
    pub fn fill(&self, span: Span, out: &mut [u8]) -> Result<()> {
        self.file.read(span.at as usize, out)
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// A file, and a checksum for each of its blocks.
#[derive(Debug)]
struct CheckedFile {
    pub path: PathBuf,
    bytes: FileBytes,
    /// Bytes that the checksums cover, from the start of the file.
    length: usize,
    crcs: Vec<u32>,
    checked: CheckedBlocks,
}

impl CheckedFile {
    pub fn new(path: PathBuf, bytes: FileBytes, length: usize, crcs: Vec<u32>) -> Self {
        let checked = CheckedBlocks::new(crcs.len());
        Self {
            path,
            bytes,
            length,
            crcs,
            checked,
        }
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        block_count(self.length)
    }

    /// Fills `out` from byte `at` on, after checking the blocks that hold it.
    #[inline]
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        self.ensure(at..at + out.len())?;
        self.bytes.read(&self.path, at, out)
    }

    /// Touches mapped bytes that will be read, so that the cache misses of many reads overlap. The
    /// bytes are neither checked nor used.
    pub fn touch(&self, range: Range<usize>) {
        if let FileBytes::Map(map) = &self.bytes {
            let lines = range.step_by(LINE);
            let bytes = lines.map(|at| map.get(at).copied().unwrap_or_default());
            black_box(bytes.fold(0, |all, byte| all ^ byte));
        }
    }

    fn ensure(&self, range: Range<usize>) -> Result<()> {
        if range.end > self.length {
            return Err(self.outside(&range));
        }
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            if !self.checked.contains(block) {
                self.check(block)?;
            }
        }
        Ok(())
    }

    #[cold]
    fn outside(&self, range: &Range<usize>) -> Error {
        let reason = format!("bytes {range:?} are outside its {} bytes", self.length);
        Error::cache(&self.path, reason)
    }

    /// Compares one block, even if it matched before.
    #[cold]
    pub fn check(&self, block: usize) -> Result<()> {
        let range = block * BLOCK..((block + 1) * BLOCK).min(self.length);
        let crc = match &self.bytes {
            FileBytes::Map(map) => crc32c::crc32c(&map[range.clone()]),
            FileBytes::File(_) => {
                let mut bytes = vec![0; range.len()];
                self.bytes.read(&self.path, range.start, &mut bytes)?;
                crc32c::crc32c(&bytes)
            }
        };
        if crc != self.crcs[block] {
            let reason = format!("the checksum of bytes {range:?} does not match");
            return Err(Error::cache(&self.path, reason));
        }
        self.checked.insert(block);
        Ok(())
    }
}
