//! A journal from front to back: what was acknowledged, what was torn, what is damaged.

use std::{fmt::Display, path::Path};

use super::{
    Fingerprint, Kind,
    disk::DiskFile,
    journal::{self, Chain, HEADER, PAYLOAD_AT, PAYLOAD_CRC_AT, RECORDS_AT, SEQUENCE_AT},
};
use crate::{
    Error, Result,
    fingerprint::Key,
    wire::{ALIGNMENT, aligned, is_signed, u32_at, u64_at},
};

const KEY: usize = size_of::<Key>();
/// Bytes looked through at a time behind a torn block.
const CHUNK: usize = 1 << 20;

/// One completion's place in a journal.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    pub key: Key,
    /// Byte of the first value.
    pub offset: u64,
    /// Number of tokens.
    pub tokens: u32,
}

/// What a journal holds.
#[derive(Debug, Default)]
pub struct Contents {
    pub records: Vec<Record>,
    /// Bytes behind the last whole block.
    pub torn: u64,
    /// Bytes that were read.
    pub length: u64,
}

/// A journal that is read from front to back, up to the length it had when that began: another
/// process may be appending.
struct Scan<'a> {
    path: &'a Path,
    file: &'a dyn DiskFile,
    kind: Kind,
    length: u64,
    chain: Chain,
    header: [u8; HEADER],
    payload: Vec<u8>,
}

/// Reads and checks every byte of a journal.
pub fn scan(
    path: &Path,
    file: &dyn DiskFile,
    fingerprint: &Fingerprint,
    kind: Kind,
) -> Result<Contents> {
    let length = file.length().map_err(Error::io(path))?;
    let mut header = [0; HEADER];
    if length >= HEADER as u64 {
        file.read_at(&mut header, 0).map_err(Error::io(path))?;
    }
    if length <= HEADER as u64 && !is_signed(&header) {
        // Its writer died while it was being created.
        return Ok(Contents {
            torn: length,
            length,
            ..Contents::default()
        });
    }
    if let Some(reason) = journal::refusal(&header, fingerprint, kind) {
        return Err(Error::cache(path, reason));
    }
    Scan {
        path,
        file,
        kind,
        length,
        chain: Chain::new(&header),
        header,
        payload: Vec::new(),
    }
    .run()
}

impl Scan<'_> {
    fn run(mut self) -> Result<Contents> {
        let mut contents = Contents {
            length: self.length,
            ..Contents::default()
        };
        let mut at = HEADER as u64;
        while at < self.length {
            if !self.read_block(at)? {
                self.refuse_later_block(at)?;
                contents.torn = self.length - at;
                break;
            }
            self.collect(at, &mut contents.records)?;
            self.chain.advance(&self.header);
            at += (HEADER + self.payload.len()) as u64;
        }
        Ok(contents)
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file.read_at(bytes, at).map_err(Error::io(self.path))
    }

    /// Reads the block at `at`; false if it is not whole.
    fn read_block(&mut self, at: u64) -> Result<bool> {
        let room = (self.length - at).checked_sub(HEADER as u64);
        let Some(room) = room else { return Ok(false) };
        let mut header = [0; HEADER];
        self.read(&mut header, at)?;
        self.header = header;
        let length = u64_at(&header, PAYLOAD_AT);
        if !self.chain.expects(&header) || length > room {
            return Ok(false);
        }
        let mut payload = std::mem::take(&mut self.payload);
        payload.resize(length as usize, 0);
        self.read(&mut payload, at + HEADER as u64)?;
        self.payload = payload;
        Ok(crc32c::crc32c(&self.payload) == u32_at(&header, PAYLOAD_CRC_AT))
    }

    /// A block is written after the one before is durable, so a later one proves damage at `at`.
    fn refuse_later_block(&self, at: u64) -> Result<()> {
        let mut chunk = vec![0; CHUNK.min((self.length - at) as usize)];
        let mut start = at;
        while start < self.length {
            let length = (self.length - start).min(chunk.len() as u64) as usize;
            let chunk = &mut chunk[..length];
            self.read(chunk, start)?;
            let headers = chunk.chunks_exact(HEADER).zip((start..).step_by(HEADER));
            for (header, place) in headers.filter(|(header, _)| self.chain.owns(header)) {
                let sequence = u64_at(header, SEQUENCE_AT);
                if place > at || sequence != self.chain.sequence() {
                    let reason = format!("block {sequence} at byte {place} is whole");
                    return Err(self.damage(at, reason));
                }
            }
            start += length as u64;
        }
        Ok(())
    }

    fn damage(&self, at: u64, reason: impl Display) -> Error {
        let sequence = self.chain.sequence();
        let reason = format!("block {sequence} at byte {at} is damaged: {reason}");
        Error::cache(self.path, reason)
    }

    /// Takes over the records of the block just read.
    fn collect(&self, at: u64, records: &mut Vec<Record>) -> Result<()> {
        let broken = || self.damage(at, "its records do not fill it");
        let count = u32_at(&self.header, RECORDS_AT) as usize;
        let values = aligned(count * (KEY + 4));
        let index = self.payload.get(..values).ok_or_else(broken)?;
        let (keys, tokens) = index.split_at(count * KEY);
        let mut end = values as u64;
        for (&key, &tokens) in keys.as_chunks().0.iter().zip(tokens.as_chunks().0) {
            let tokens = u32::from_le_bytes(tokens);
            let offset = at + HEADER as u64 + end;
            records.push(Record {
                key,
                offset,
                tokens,
            });
            end += self.kind.bytes(tokens) as u64;
        }
        let own = &records[records.len() - count..];
        let without = |record: &Record| record.tokens == 0 && self.kind == Kind::PerToken;
        let empty = count == 0 || own.iter().any(without);
        if empty || end.next_multiple_of(ALIGNMENT as u64) != self.payload.len() as u64 {
            return Err(broken());
        }
        match self.kind.impossible(&self.payload[values..end as usize]) {
            Some((_, value)) => Err(self.damage(at, format!("it holds the log-prob {value}"))),
            None => Ok(()),
        }
    }
}
