//! A column on its way to a store: buffered and hashed piece by piece.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
};

use blake3::{Hash, Hasher};

use super::blocks::BlockCrcs;

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
pub struct Spool {
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

impl Spool {
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

    /// A column that goes on after `written`, which its sink holds already, once it is cut.
    pub fn go_on(sink: Sink, room: usize, written: &[u8]) -> Self {
        let mut spool = Self::new(sink, room, &[]);
        spool.note(written);
        spool
    }

    fn note(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        if let Some(crcs) = &mut self.crcs {
            crcs.update(bytes);
        }
        self.length += bytes.len();
    }

    /// Drops what the sink holds behind the column.
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
        self.note(&buffer);
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

    /// Hands every piece of the flushed column to `each`.
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
