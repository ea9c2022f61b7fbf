//! Columns while they are written: buffered, hashed, and at the end joined into one file.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
};

use blake3::{Hash, Hasher};

use super::format::{Column, Counts, FOOTER, PLAIN, WEIGHTED, footer, header};
use crate::file_format::{ALIGNMENT, BlockCrcs, aligned, block_count};

/// Bytes go to their sink in pieces of this size.
const PIECE: usize = 256 << 10;

/// Where bytes go.
#[derive(Debug)]
pub enum Sink {
    Memory(Vec<u8>),
    Disk(File),
}

impl Sink {
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Memory(memory) => memory.write_all(bytes),
            Self::Disk(file) => file.write_all(bytes),
        }
    }

    fn read_at(&self, at: usize, into: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Memory(memory) => into.copy_from_slice(&memory[at..at + into.len()]),
            Self::Disk(file) => file.read_exact_at(into, at as u64)?,
        }
        Ok(())
    }

    /// Writes where the room for a header was left.
    pub fn overwrite_start(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Memory(memory) => memory[..bytes.len()].copy_from_slice(bytes),
            Self::Disk(file) => {
                file.seek(SeekFrom::Start(0))?;
                file.write_all(bytes)?;
            }
        }
        Ok(())
    }
}

/// A column that still grows.
#[derive(Debug)]
pub struct ColumnWriter {
    sink: Sink,
    buffer: Vec<u8>,
    /// Bytes in the sink before the column.
    room: usize,
    /// Bytes of the column in the sink.
    length: usize,
    hasher: Hasher,
    /// Of the column that the others are appended to.
    crcs: Option<BlockCrcs>,
}

impl ColumnWriter {
    /// A column that begins with `start`, in a sink that holds `room` bytes.
    pub fn new(sink: Sink, room: usize, start: &[u8]) -> Self {
        Self {
            sink,
            buffer: start.to_vec(),
            room,
            length: 0,
            hasher: Hasher::new(),
            crcs: (room > 0).then(|| BlockCrcs::new(room)),
        }
    }

    /// A column that continues after `written`, which its sink holds already. Call [`Self::cut`] first.
    pub fn continued(sink: Sink, room: usize, written: &[u8]) -> Self {
        let mut column = Self::new(sink, room, &[]);
        column.append_flushed(written);
        column
    }

    fn append_flushed(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        if let Some(crcs) = &mut self.crcs {
            crcs.update(bytes);
        }
        self.length += bytes.len();
    }

    /// Truncates the sink after the column.
    pub fn cut(&mut self) -> io::Result<()> {
        let end = self.end();
        match &mut self.sink {
            Sink::Memory(memory) => memory.truncate(end),
            Sink::Disk(file) => {
                file.set_len(end as u64)?;
                file.seek(SeekFrom::Start(end as u64))?;
            }
        }
        Ok(())
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.flush()
        } else {
            Ok(())
        }
    }

    pub fn flush(&mut self) -> io::Result<()> {
        let buffer = std::mem::take(&mut self.buffer);
        self.append_flushed(&buffer);
        self.sink.write(&buffer)?;
        self.buffer = buffer;
        self.buffer.clear();
        Ok(())
    }

    /// Makes everything written so far survive a loss of power.
    pub fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        match &self.sink {
            Sink::Memory(_) => Ok(()),
            Sink::Disk(file) => file.sync_data(),
        }
    }

    /// Where the sink ends, by what was flushed.
    pub fn end(&self) -> usize {
        self.room + self.length
    }

    /// Hash of everything that was flushed.
    pub fn hash(&self) -> Hash {
        self.hasher.finalize()
    }

    /// Bytes of the column that were written already.
    pub fn read_at<const LENGTH: usize>(&self, at: usize) -> io::Result<[u8; LENGTH]> {
        let mut bytes = [0; LENGTH];
        match at.checked_sub(self.length) {
            Some(at) => bytes.copy_from_slice(&self.buffer[at..at + LENGTH]),
            None => self.sink.read_at(self.room + at, &mut bytes)?,
        }
        Ok(bytes)
    }

    /// Calls `each` with the flushed column, piece by piece.
    pub fn pieces(&self, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        for start in (0..self.length).step_by(PIECE) {
            let piece = &mut piece[..(self.length - start).min(PIECE)];
            self.sink.read_at(self.room + start, piece)?;
            each(piece)?;
        }
        Ok(())
    }

    /// The flushed sink, and the checksums so far if it is the column that others are appended to.
    pub fn into_parts(self) -> (Sink, Option<BlockCrcs>) {
        (self.sink, self.crcs)
    }
}

/// A file that grows, and the checksums of its blocks.
struct StoreFile {
    sink: Sink,
    crcs: BlockCrcs,
    end: usize,
}

impl StoreFile {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crcs.update(bytes);
        self.end += bytes.len();
        self.sink.write(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        self.put(&[0; ALIGNMENT][..aligned(self.end) - self.end])
    }

    /// Table, footer and, in the room before the first column, the header.
    fn close(mut self, version: u32, counts: Counts, digest: &[u8; 32]) -> io::Result<Sink> {
        let mut table = self.crcs.finish();
        let blocks = block_count(self.end);
        table.resize(aligned(table.len()), 0);
        self.sink.write(&table)?;
        self.sink.write(&footer(digest, blocks, &table))?;
        let length = self.end + table.len() + FOOTER;
        self.sink
            .overwrite_start(&header(version, counts, length, digest))?;
        Ok(self.sink)
    }
}

/// Appends everything to the first column, whose sink has room for the header.
///
/// The files of the other columns stay as they are: a crash here loses nothing.
pub fn join(mut columns: Vec<ColumnWriter>, counts: Counts, metadata: &str) -> io::Result<Sink> {
    columns.iter_mut().try_for_each(ColumnWriter::flush)?;
    let digest = digest(columns.iter().map(|column| *column.hash().as_bytes()));
    let tokens = columns.remove(Column::Tokens as usize);
    let (end, (sink, crcs)) = (tokens.end(), tokens.into_parts());
    let crcs = crcs.expect("the first column has room before it");
    let mut file = StoreFile { sink, crcs, end };
    let (mut version, mask) = (PLAIN, Column::Mask as usize - 1);
    for (number, column) in columns.into_iter().enumerate() {
        file.pad()?;
        column.pieces(|bytes| {
            if number == mask && bytes.iter().any(|&value| value > 1) {
                version = WEIGHTED;
            }
            file.put(bytes)
        })?;
    }
    file.pad()?;
    file.put(metadata.as_bytes())?;
    file.pad()?;
    let metadata = metadata.len();
    file.close(version, Counts { metadata, ..counts }, &digest)
}

/// The hash of the columns' hashes, in the order of the file.
pub fn digest(hashes: impl Iterator<Item = [u8; 32]>) -> [u8; 32] {
    let mut digest = Hasher::new();
    for hash in hashes {
        digest.update(&hash);
    }
    digest.finalize().into()
}
