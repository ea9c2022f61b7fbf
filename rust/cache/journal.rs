//! A journal: its bytes (`FORMAT.md` in code), its scan from front to back, and its records by key.
//!
//! A block is begun only when all blocks before it are durable. So at most the last block can be torn,
//! and a whole block behind a broken one proves damage.

use std::{
    fmt::Display,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use super::{
    disk::DiskFile,
    folder::{Cache, Fingerprint, Span, ValueKind, wrong_kind},
};
use crate::{
    Error, Result,
    content_key::Key,
    file_format::{
        ALIGNMENT, ENDIAN_TAG, Hex, aligned, checksum_matches, u32_at, u64_at, with_checksum,
    },
};

const MAGIC: &[u8; 8] = b"LRJOURN1";
/// The newest version that is read; the kind's own is what a journal needs.
const VERSION: u32 = 2;
/// Length of the journal's header and of every block's.
const HEADER: usize = ALIGNMENT;

const VERSION_AT: usize = MAGIC.len();
const ENDIAN_AT: usize = VERSION_AT + 4;
const FINGERPRINT_AT: usize = ENDIAN_AT + 4;
const ID_AT: usize = FINGERPRINT_AT + 32;
const KIND_AT: usize = ID_AT + 8;
const CRC_AT: usize = HEADER - 4;

const BLOCK_MAGIC: &[u8; 8] = b"LRBLOCK1";
const JOURNAL_AT: usize = BLOCK_MAGIC.len();
const SEQUENCE_AT: usize = JOURNAL_AT + 8;
const PAYLOAD_AT: usize = SEQUENCE_AT + 8;
const RECORDS_AT: usize = PAYLOAD_AT + 8;
const PREVIOUS_AT: usize = RECORDS_AT + 4;
const PAYLOAD_CRC_AT: usize = PREVIOUS_AT + 4;

/// Journals of sums came with version 2.
fn version(kind: ValueKind) -> u32 {
    1 + kind as u32
}

/// The journal's first 64 bytes.
pub fn header(fingerprint: &Fingerprint, kind: ValueKind, id: u64) -> Vec<u8> {
    let [version, endian, kind] = [version(kind), ENDIAN_TAG, kind as u32].map(u32::to_le_bytes);
    let id = id.to_le_bytes();
    with_checksum(&[MAGIC, &version, &endian, fingerprint, &id, &kind], HEADER)
}

/// Why these 64 bytes do not begin a journal of this reference and kind.
fn refusal(header: &[u8], fingerprint: &Fingerprint, kind: ValueKind) -> Option<String> {
    let version = u32_at(header, VERSION_AT);
    let found = &header[FINGERPRINT_AT..ID_AT];
    if !header.starts_with(MAGIC) {
        Some("it does not begin with LRJOURN1".into())
    } else if u32_at(header, ENDIAN_AT) == ENDIAN_TAG.swap_bytes() {
        Some("it was written on a big-endian machine".into())
    } else if !checksum_matches(header) {
        Some("the header's checksum does not match".into())
    } else if !(1..=VERSION).contains(&version) {
        Some(format!(
            "format version {version}, this library reads 1 to {VERSION}"
        ))
    } else if found != fingerprint {
        let (found, wanted) = (Hex(found), Hex(fingerprint));
        Some(format!("it belongs to reference {found}, not to {wanted}"))
    } else if version != self::version(kind) && u32_at(header, KIND_AT) == kind as u32 {
        let kind = kind.name();
        Some(format!("format version {version} never held {kind} values"))
    } else {
        wrong_kind(u32_at(header, KIND_AT), kind)
    }
}

/// What the next block of a journal must repeat.
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

    /// Number of the next block.
    pub fn sequence(self) -> u64 {
        self.sequence
    }

    /// Moves past the block with this header.
    pub fn advance(&mut self, header: &[u8]) {
        self.sequence += 1;
        self.previous = u32_at(header, CRC_AT);
    }

    /// The next block, header first.
    pub fn block(self, keys: &[Key], tokens: &[u32], values: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(keys.as_flattened());
        bytes.extend(tokens.iter().copied().flat_map(u32::to_le_bytes));
        bytes.resize(aligned(bytes.len()), 0);
        bytes.extend_from_slice(values);
        bytes.resize(aligned(bytes.len()), 0);
        let header = self.header(keys.len() as u32, &bytes[HEADER..]);
        bytes[..HEADER].copy_from_slice(&header);
        bytes
    }

    fn header(self, records: u32, payload: &[u8]) -> Vec<u8> {
        let numbers = [self.id, self.sequence, payload.len() as u64].map(u64::to_le_bytes);
        let small = [records, self.previous, crc32c::crc32c(payload)].map(u32::to_le_bytes);
        with_checksum(
            &[BLOCK_MAGIC, numbers.as_flattened(), small.as_flattened()],
            HEADER,
        )
    }

    /// Whether these 64 bytes are the header of some block of this journal.
    pub fn owns(self, header: &[u8]) -> bool {
        header.starts_with(BLOCK_MAGIC)
            && u64_at(header, JOURNAL_AT) == self.id
            && checksum_matches(header)
    }

    /// Whether these 64 bytes are the header of the next block.
    pub fn expects(self, header: &[u8]) -> bool {
        self.owns(header)
            && u64_at(header, SEQUENCE_AT) == self.sequence
            && u32_at(header, PREVIOUS_AT) == self.previous
    }
}

const KEY: usize = size_of::<Key>();
/// Bytes searched at a time after a torn block.
const CHUNK: usize = 1 << 20;

/// One completion's place in a journal.
#[derive(Clone, Copy, Debug)]
struct Record {
    pub key: Key,
    /// Byte of the first value.
    pub offset: u64,
    /// Number of tokens.
    pub tokens: u32,
}

/// What a journal holds.
#[derive(Debug, Default)]
struct Contents {
    pub records: Vec<Record>,
    /// Bytes after the last whole block.
    pub torn: u64,
    /// Bytes that were read.
    pub length: u64,
}

/// A journal that is read from front to back, up to the length it had when that began: another
/// process may be appending.
struct Scan<'a> {
    path: &'a Path,
    file: &'a dyn DiskFile,
    kind: ValueKind,
    length: u64,
    chain: Chain,
    header: [u8; HEADER],
    payload: Vec<u8>,
}

/// Reads and checks every byte of a journal.
fn scan(
    path: &Path,
    file: &dyn DiskFile,
    fingerprint: &Fingerprint,
    kind: ValueKind,
) -> Result<Contents> {
    let length = file.length().map_err(Error::io(path))?;
    let mut header = [0; HEADER];
    if length >= HEADER as u64 {
        file.read_at(&mut header, 0).map_err(Error::io(path))?;
    }
    if length <= HEADER as u64 && !checksum_matches(&header) {
        // Its writer died while it was being created.
        return Ok(Contents {
            torn: length,
            length,
            ..Contents::default()
        });
    }
    if let Some(reason) = refusal(&header, fingerprint, kind) {
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

    /// Reads the block at `at`; false if it is incomplete or damaged.
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

    /// Collects the records of the block just read.
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
        let without = |record: &Record| record.tokens == 0 && self.kind == ValueKind::PerToken;
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

/// A journal whose every byte was checked when it was opened. Holds 48 bytes a record in memory and
/// no values.
#[derive(Debug)]
pub struct JournalTable {
    path: PathBuf,
    file: Box<dyn DiskFile>,
    records: Vec<Record>,
    /// Bytes after the last whole block.
    pub torn: u64,
    /// Bytes that were there when it was opened.
    pub length: u64,
}

impl JournalTable {
    pub fn open(cache: &Cache, path: PathBuf) -> Result<Self> {
        let file = cache.disk.open(&path).map_err(Error::io(&path))?;
        Self::of(cache, path, file)
    }

    /// Reads a journal that is open.
    pub fn of(cache: &Cache, path: PathBuf, file: Box<dyn DiskFile>) -> Result<Self> {
        let contents = scan(&path, &*file, &cache.fingerprint, cache.kind)?;
        let mut records = contents.records;
        records.sort_unstable_by_key(|record| (record.key, record.offset));
        Ok(Self {
            path,
            file,
            records,
            torn: contents.torn,
            length: contents.length,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rows(&self) -> u64 {
        self.records.len() as u64
    }

    pub fn all_tokens(&self) -> u64 {
        let tokens = |record: &Record| u64::from(record.tokens);
        self.records.iter().map(tokens).sum()
    }

    pub fn key(&self, row: u64) -> Key {
        self.records[row as usize].key
    }

    /// Where a row's values are.
    pub fn span(&self, row: u64) -> Span {
        let Record { offset, tokens, .. } = self.records[row as usize];
        Span { at: offset, tokens }
    }

    /// Fills `out` with a row's values.
    pub fn fill(&self, span: Span, out: &mut [u8]) -> Result<()> {
        self.read(span.at, out)
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.file.read_at(bytes, at);
        read.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Error::cache(&self.path, "it was cut after it was opened"),
            _ => Error::io(&self.path)(error),
        })
    }
}
