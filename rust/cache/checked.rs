//! A sealed file whose blocks are compared with their checksums at their first read.

use std::{
    hint::black_box,
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{ReadMode, disk::DiskFile};
use crate::{
    Error, Result,
    map::Map,
    store::blocks::{BLOCK, Whole, count},
};

/// Bytes that memory is fetched by.
const LINE: usize = 64;

/// The bytes of a sealed file, mapped or read by calls to the system.
#[derive(Debug)]
pub enum Bytes {
    Map(Map),
    File(Box<dyn DiskFile>),
}

impl Bytes {
    /// A file that cannot be mapped (not every network file system can) is read by calls.
    pub fn new(file: Box<dyn DiskFile>, mode: ReadMode) -> Self {
        let map = (mode == ReadMode::Map).then(|| file.map().ok()).flatten();
        map.map_or(Self::File(file), Self::Map)
    }

    /// Fills `out` from byte `at` on.
    pub fn read(&self, path: &Path, at: usize, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Map(map) => {
                let bytes = map.get(at..at + out.len());
                out.copy_from_slice(bytes.ok_or_else(|| cut(path, map.len() as u64))?);
                Ok(())
            }
            Self::File(file) => file.read_at(out, at as u64).map_err(|error| {
                let ended = error.kind() == io::ErrorKind::UnexpectedEof;
                if ended {
                    cut(path, file.length().unwrap_or(0))
                } else {
                    Error::io(path)(error)
                }
            }),
        }
    }
}

fn cut(path: &Path, length: u64) -> Error {
    Error::cache(path, format!("it was cut to {length} bytes"))
}

/// A file, and a checksum for each of its blocks.
#[derive(Debug)]
pub struct CheckedFile {
    pub path: PathBuf,
    bytes: Bytes,
    /// Bytes that the checksums cover, from the start of the file.
    length: usize,
    crcs: Vec<u32>,
    whole: Whole,
}

impl CheckedFile {
    pub fn new(path: PathBuf, bytes: Bytes, length: usize, crcs: Vec<u32>) -> Self {
        let whole = Whole::new(crcs.len());
        Self {
            path,
            bytes,
            length,
            crcs,
            whole,
        }
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        count(self.length)
    }

    /// Fills `out` from byte `at` on, from blocks that are whole.
    #[inline]
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        self.ensure(at..at + out.len())?;
        self.bytes.read(&self.path, at, out)
    }

    /// Reaches for mapped bytes that will be read, so that the misses of many reads overlap. What
    /// comes is neither checked nor used.
    pub fn touch(&self, range: Range<usize>) {
        if let Bytes::Map(map) = &self.bytes {
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
            if !self.whole.contains(block) {
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

    /// Compares one block, whatever was found before.
    #[cold]
    pub fn check(&self, block: usize) -> Result<()> {
        let range = block * BLOCK..((block + 1) * BLOCK).min(self.length);
        let crc = match &self.bytes {
            Bytes::Map(map) => crc32c::crc32c(&map[range.clone()]),
            Bytes::File(_) => {
                let mut bytes = vec![0; range.len()];
                self.bytes.read(&self.path, range.start, &mut bytes)?;
                crc32c::crc32c(&bytes)
            }
        };
        if crc != self.crcs[block] {
            let reason = format!("the checksum of bytes {range:?} does not match");
            return Err(Error::cache(&self.path, reason));
        }
        self.whole.insert(block);
        Ok(())
    }
}
