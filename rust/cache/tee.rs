//! A shard's bytes on their way to the disk: hashed, checksummed, sealed.

use std::{
    io::{self, Write},
    sync::Arc,
};

use sha2::{Digest, Sha256};

use super::{
    batch::Batch,
    disk::DiskFile,
    shard_seal::{Seal, TAIL},
};
use crate::{
    store::blocks::BlockCrcs,
    wire::{ALIGNMENT, Hex, u32_at},
};

/// Bytes handed to the system at once.
pub const CHUNK: usize = 1 << 20;
/// More than the bytes that describe a batch, at its beginning.
const METADATA: usize = 1 << 12;
/// A file on its way to the disk, hashed as it goes.
pub struct Tee {
    file: Arc<dyn DiskFile>,
    pending: Vec<u8>,
    pub at: usize,
    crcs: BlockCrcs,
    sha256: Sha256,
    /// The bytes of the batch that is being written.
    pub captured: Option<Vec<u8>>,
    /// What Arrow writes behind the batches, held back.
    pub tail: Option<Vec<u8>>,
}

impl Tee {
    pub fn new(file: Box<dyn DiskFile>) -> Self {
        Self {
            file: file.into(),
            pending: Vec::new(),
            at: 0,
            crcs: BlockCrcs::new(0),
            sha256: Sha256::new(),
            captured: None,
            tail: None,
        }
    }

    /// The file, whose lock lives as long as somebody has it.
    pub fn file(&self) -> Arc<dyn DiskFile> {
        Arc::clone(&self.file)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sha256.update(bytes);
        self.pending.extend_from_slice(bytes);
        self.at += bytes.len();
        if self.pending.len() < CHUNK {
            return Ok(());
        }
        self.send()
    }

    fn send(&mut self) -> io::Result<()> {
        self.file.append(&self.pending)?;
        self.pending.clear();
        Ok(())
    }

    /// Puts the seal between Arrow's end of stream and its footer, and makes the file durable.
    /// Returns the file's SHA-256 and the tail's CRC32C.
    pub fn seal(
        &mut self,
        seal: impl FnOnce(u64) -> Seal,
        batches: &[Batch],
    ) -> io::Result<(String, u32)> {
        let tail = self.tail.take().unwrap_or_default();
        let (end, footer) = tail.split_at(8); // of the stream
        self.write_all(end)?;
        let gap = self.at.next_multiple_of(ALIGNMENT) - self.at;
        self.write_all(&[0; ALIGNMENT][..gap])?;
        let crcs = std::mem::replace(&mut self.crcs, BlockCrcs::new(0)).finish();
        let seal = seal(self.at as u64).encode(batches, &crcs, footer);
        self.put(&seal)?;
        self.put(footer)?;
        self.send()?;
        self.file.sync()?;
        let hash = std::mem::take(&mut self.sha256).finalize();
        Ok((
            Hex(&hash).to_string(),
            u32_at(&seal[seal.len() - TAIL..], TAIL - 4),
        ))
    }
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(tail) = &mut self.tail {
            tail.extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        if let Some(captured) = &mut self.captured
            && captured.len() < METADATA
        {
            captured.extend_from_slice(bytes);
        }
        self.crcs.update(bytes);
        self.put(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
