//! A column on its way to a store: buffered, hashed and checksummed piece by piece.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom, Write},
};

use blake3::{Hash, Hasher};

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

    /// Takes over the bytes of `other`.
    pub fn append(&mut self, other: Self) -> io::Result<()> {
        match (self, other) {
            (sink, Self::Memory(bytes)) => sink.write(&bytes),
            (Self::Disk(file), Self::Disk(mut other)) => {
                other.rewind()?;
                io::copy(&mut other, file).map(drop)
            }
            (Self::Memory(memory), Self::Disk(mut other)) => {
                other.rewind()?;
                io::copy(&mut other, memory).map(drop)
            }
        }
    }

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
    length: usize,
    crc: u32,
    hasher: Hasher,
}

/// A column that is complete.
#[derive(Debug)]
pub struct Spooled {
    pub sink: Sink,
    pub length: usize,
    pub crc: u32,
    pub hash: Hash,
}

impl Spool {
    /// Starts with the bytes of `start`.
    pub fn new(sink: Sink, start: &[u8]) -> Self {
        Self {
            sink,
            buffer: start.to_vec(),
            length: 0,
            crc: 0,
            hasher: Hasher::new(),
        }
    }

    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.crc = crc32c::crc32c_append(self.crc, &self.buffer);
        self.hasher.update(&self.buffer);
        self.length += self.buffer.len();
        self.sink.write(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<Spooled> {
        self.flush()?;
        let hash = self.hasher.finalize();
        Ok(Spooled {
            sink: self.sink,
            length: self.length,
            crc: self.crc,
            hash,
        })
    }
}
