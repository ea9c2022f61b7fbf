//! A journal's bytes: encoded, decoded, and told apart from damage. `FORMAT.md` in code.

use std::{fmt::Display, fs::File, io, os::unix::fs::FileExt, path::Path};

use super::{Fingerprint, impossible};
use crate::{
    Error, Result,
    fingerprint::Key,
    wire::{self, ALIGNMENT, Hex, aligned, u32_at, u64_at},
};

const MAGIC: &[u8; 8] = b"LRJOURN1";
const VERSION: u32 = 1;
/// Length of the journal's header and of every block's.
pub const HEADER: usize = ALIGNMENT;

const VERSION_AT: usize = MAGIC.len();
const ENDIAN_AT: usize = VERSION_AT + 4;
const FINGERPRINT_AT: usize = ENDIAN_AT + 4;
const ID_AT: usize = FINGERPRINT_AT + 32;
const CRC_AT: usize = HEADER - 4;

const BLOCK_MAGIC: &[u8; 8] = b"LRBLOCK1";
const JOURNAL_AT: usize = BLOCK_MAGIC.len();
const SEQUENCE_AT: usize = JOURNAL_AT + 8;
const PAYLOAD_AT: usize = SEQUENCE_AT + 8;
const RECORDS_AT: usize = PAYLOAD_AT + 8;
const PREVIOUS_AT: usize = RECORDS_AT + 4;
const PAYLOAD_CRC_AT: usize = PREVIOUS_AT + 4;

const KEY: usize = size_of::<Key>();

/// The journal's first 64 bytes.
pub fn header(fingerprint: &Fingerprint, id: u64) -> Vec<u8> {
    let (version, endian) = (VERSION.to_le_bytes(), wire::ENDIAN_TAG.to_le_bytes());
    wire::signed(
        &[MAGIC, &version, &endian, fingerprint, &id.to_le_bytes()],
        HEADER,
    )
}

/// Where a journal stands: what its next block must repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    id: u64,
    sequence: u64,
    previous: u32,
}

impl Chain {
    /// Before the first block of a journal with this header.
    pub fn new(header: &[u8]) -> Self {
        Self {
            id: u64_at(header, ID_AT),
            sequence: 0,
            previous: u32_at(header, CRC_AT),
        }
    }

    /// Whether no block was written.
    pub fn is_empty(self) -> bool {
        self.sequence == 0
    }

    /// Goes on behind the block with this header.
    pub fn advance(&mut self, header: &[u8]) {
        self.sequence += 1;
        self.previous = u32_at(header, CRC_AT);
    }

    /// The next block, header first. `offsets` are 0 or more.
    pub fn block(self, keys: &[Key], offsets: &[i64], logps: &[f32]) -> Vec<u8> {
        let counts = offsets
            .windows(2)
            .map(|pair| pair[1].abs_diff(pair[0]) as u32);
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(keys.as_flattened());
        bytes.extend(counts.flat_map(u32::to_le_bytes));
        bytes.resize(aligned(bytes.len()), 0);
        bytes.extend_from_slice(bytemuck::cast_slice(logps));
        bytes.resize(aligned(bytes.len()), 0);
        let header = self.header(keys.len() as u32, &bytes[HEADER..]);
        bytes[..HEADER].copy_from_slice(&header);
        bytes
    }

    fn header(self, records: u32, payload: &[u8]) -> Vec<u8> {
        let numbers = [self.id, self.sequence, payload.len() as u64].map(u64::to_le_bytes);
        let small = [records, self.previous, crc32c::crc32c(payload)].map(u32::to_le_bytes);
        wire::signed(
            &[BLOCK_MAGIC, numbers.as_flattened(), small.as_flattened()],
            HEADER,
        )
    }

    /// Whether these 64 bytes are the header of some block of this journal.
    fn owns(self, header: &[u8]) -> bool {
        header.starts_with(BLOCK_MAGIC)
            && u64_at(header, JOURNAL_AT) == self.id
            && wire::is_signed(header)
    }

    /// Whether these 64 bytes are the header of the next block.
    fn expects(self, header: &[u8]) -> bool {
        self.owns(header)
            && u64_at(header, SEQUENCE_AT) == self.sequence
            && u32_at(header, PREVIOUS_AT) == self.previous
    }
}

/// One completion's place in a journal.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    pub key: Key,
    /// Byte of the first value.
    pub offset: u64,
    /// Number of values.
    pub count: u32,
}

/// What a journal holds.
#[derive(Debug)]
pub struct Contents {
    pub records: Vec<Record>,
    /// Bytes behind the last whole block.
    pub torn: u64,
}

impl Contents {
    fn torn(bytes: u64) -> Self {
        Self {
            records: Vec::new(),
            torn: bytes,
        }
    }
}

/// A journal that is read from front to back, up to the length it had when that began: another
/// process may be appending.
struct Scan<'a> {
    path: &'a Path,
    file: &'a File,
    length: u64,
    chain: Chain,
    header: [u8; HEADER],
    payload: Vec<u8>,
}

/// Reads and checks every byte of a journal.
pub fn scan(path: &Path, file: &File, fingerprint: &Fingerprint) -> Result<Contents> {
    let length = file.metadata().map_err(Error::io(path))?.len();
    let mut header = [0; HEADER];
    if length >= HEADER as u64 {
        file.read_exact_at(&mut header, 0)
            .map_err(Error::io(path))?;
    }
    if length <= HEADER as u64 && !wire::is_signed(&header) {
        return Ok(Contents::torn(length)); // its writer died while it was being created
    }
    check_header(path, &header, fingerprint)?;
    let chain = Chain::new(&header);
    Scan {
        path,
        file,
        length,
        chain,
        header,
        payload: Vec::new(),
    }
    .run()
}

fn check_header(path: &Path, header: &[u8], fingerprint: &Fingerprint) -> Result<()> {
    let version = u32_at(header, VERSION_AT);
    let found = &header[FINGERPRINT_AT..ID_AT];
    let reason = if !header.starts_with(MAGIC) {
        "it does not begin with LRJOURN1".into()
    } else if u32_at(header, ENDIAN_AT) == wire::ENDIAN_TAG.swap_bytes() {
        "it was written on a big-endian machine".into()
    } else if !wire::is_signed(header) {
        "the header's checksum does not match".into()
    } else if version != VERSION {
        format!("format version {version}, this library reads {VERSION}")
    } else if found != fingerprint {
        format!(
            "it belongs to reference {}, not to {}",
            Hex(found),
            Hex(fingerprint)
        )
    } else {
        return Ok(());
    };
    Err(Error::cache(path, reason))
}

impl Scan<'_> {
    fn run(mut self) -> Result<Contents> {
        let mut contents = Contents::torn(0);
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

    /// Reads the block at `at`; false if it is not whole.
    fn read_block(&mut self, at: u64) -> Result<bool> {
        let room = (self.length - at).checked_sub(HEADER as u64);
        let Some(room) = room else { return Ok(false) };
        self.file
            .read_exact_at(&mut self.header, at)
            .map_err(Error::io(self.path))?;
        let length = u64_at(&self.header, PAYLOAD_AT);
        if !self.chain.expects(&self.header) || length > room {
            return Ok(false);
        }
        self.payload.resize(length as usize, 0);
        let start = at + HEADER as u64;
        self.file
            .read_exact_at(&mut self.payload, start)
            .map_err(Error::io(self.path))?;
        Ok(crc32c::crc32c(&self.payload) == u32_at(&self.header, PAYLOAD_CRC_AT))
    }

    /// A block is written after the one before is durable, so a later one proves damage at `at`.
    fn refuse_later_block(&self, at: u64) -> Result<()> {
        let mut chunk = vec![0; 1 << 20];
        let mut start = at;
        while start < self.length {
            let length = (self.length - start).min(chunk.len() as u64) as usize;
            let chunk = &mut chunk[..length];
            self.file
                .read_exact_at(chunk, start)
                .map_err(Error::io(self.path))?;
            let headers = chunk.chunks_exact(HEADER).zip((start..).step_by(HEADER));
            for (header, place) in headers.filter(|(header, _)| self.chain.owns(header)) {
                let sequence = u64_at(header, SEQUENCE_AT);
                if place > at || sequence != self.chain.sequence {
                    return Err(
                        self.damage(at, format!("block {sequence} at byte {place} is whole"))
                    );
                }
            }
            start += length as u64;
        }
        Ok(())
    }

    fn damage(&self, at: u64, reason: impl Display) -> Error {
        let sequence = self.chain.sequence;
        let reason = format!("block {sequence} at byte {at} is damaged: {reason}");
        Error::cache(self.path, reason)
    }

    /// Takes over the records of the block just read.
    fn collect(&self, at: u64, records: &mut Vec<Record>) -> Result<()> {
        let broken = || self.damage(at, "its records do not fill it");
        let count = u32_at(&self.header, RECORDS_AT) as usize;
        let values = aligned(count * (KEY + 4));
        let index = self.payload.get(..values).ok_or_else(broken)?;
        let (keys, counts) = index.split_at(count * KEY);
        let mut end = values as u64;
        for (&key, &count) in keys.as_chunks().0.iter().zip(counts.as_chunks().0) {
            let count = u32::from_le_bytes(count);
            let offset = at + HEADER as u64 + end;
            records.push(Record { key, offset, count });
            end += 4 * u64::from(count);
        }
        let empty = records
            .iter()
            .rev()
            .take(count)
            .any(|record| record.count == 0);
        if empty || end.next_multiple_of(ALIGNMENT as u64) != self.payload.len() as u64 {
            return Err(broken());
        }
        self.check_values(at, &self.payload[values..end as usize])
    }

    fn check_values(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let values = bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes);
        match impossible(values) {
            Some((_, value)) => Err(self.damage(at, format!("it holds the log-prob {value}"))),
            None => Ok(()),
        }
    }
}

/// Reads `values` from byte `offset` of a journal that was scanned before.
pub fn read_values(path: &Path, file: &File, offset: u64, values: &mut [f32]) -> Result<()> {
    let bytes = bytemuck::cast_slice_mut(values);
    file.read_exact_at(bytes, offset)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::cache(path, "it was cut after it was opened"),
            _ => Error::io(path)(error),
        })?;
    match impossible(values.iter().copied()) {
        Some((at, value)) => {
            let at = offset + 4 * at as u64;
            Err(Error::cache(
                path,
                format!("byte {at} holds the log-prob {value}"),
            ))
        }
        None => Ok(()),
    }
}
