//! The seal of a shard (`FORMAT.md` in code): where its columns begin, and the checksums of everything.
//!
//! Arrow itself notices hardly any flipped bit. The seal is written between Arrow's data and Arrow's
//! footer, where Arrow readers do not look.

use std::path::Path;

use super::{
    disk::FileBytes,
    folder::{Cache, Fingerprint, ValueKind, wrong_kind},
};
use crate::{
    Error, Result,
    file_format::{
        ENDIAN_TAG, Hex, aligned, block_count, checksum_matches, u32_at, u64_at, with_checksum,
    },
};

const MAGIC: &[u8; 8] = b"LRSHARD1";
const VERSION: u32 = 1;
/// Length of the seal's last part, which comes before the Arrow footer.
pub const TAIL: usize = 128;
/// What an Arrow file ends with: the footer's length and `ARROW1`.
const ARROW_END: usize = 10;

const VERSION_AT: usize = MAGIC.len();
const ENDIAN_AT: usize = VERSION_AT + 4;
const FINGERPRINT_AT: usize = ENDIAN_AT + 4;
const ROWS_AT: usize = FINGERPRINT_AT + 32;
const TOKENS_AT: usize = ROWS_AT + 8;
const DATA_AT: usize = TOKENS_AT + 8;
const LENGTH_AT: usize = DATA_AT + 8;
const KIND_AT: usize = LENGTH_AT + 8;
const BATCHES_AT: usize = KIND_AT + 4;
const TABLES_CRC_AT: usize = BATCHES_AT + 4;
const FOOTER_CRC_AT: usize = TABLES_CRC_AT + 4;

/// Where the columns of one record batch begin in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub rows: u64,
    pub keys_at: u64,
    /// Offsets of each row's log-probs (i32, one more than rows), or token counts (u32).
    pub tokens_at: u64,
    pub values_at: u64,
    /// Number of values.
    pub values: u64,
}

/// Bytes of a batch in the seal.
pub const BATCH: usize = 40;

impl Batch {
    pub fn to_bytes(self) -> [u8; BATCH] {
        let fields = [
            self.rows,
            self.keys_at,
            self.tokens_at,
            self.values_at,
            self.values,
        ];
        let bytes = fields.map(u64::to_le_bytes);
        bytes.as_flattened().try_into().expect("five of eight")
    }

    /// Whether all columns are in the first `data` bytes.
    pub fn fits(&self, kind: ValueKind, data: u64) -> bool {
        let (tokens, values) = match kind {
            ValueKind::PerToken => (self.rows.saturating_add(1), self.values),
            ValueKind::Sums => (self.rows, self.rows),
        };
        let columns = [
            (self.keys_at, self.rows, 32),
            (self.tokens_at, tokens, 4),
            (self.values_at, values, kind.width() as u64),
        ];
        let ends = columns.map(|(at, items, width)| {
            let bytes = items.checked_mul(width)?;
            at.checked_add(bytes)
        });
        values == self.values && ends.iter().all(|end| end.is_some_and(|end| end <= data))
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let [rows, keys_at, tokens_at, values_at, values] =
            [0, 8, 16, 24, 32].map(|at| u64_at(bytes, at));
        Self {
            rows,
            keys_at,
            tokens_at,
            values_at,
            values,
        }
    }
}

/// The numbers of a shard in its seal.
#[derive(Clone, Copy, Debug)]
pub struct Seal {
    pub fingerprint: Fingerprint,
    pub kind: ValueKind,
    pub rows: u64,
    pub tokens: u64,
    /// Bytes of Arrow data, which the block checksums cover.
    pub data: u64,
}

impl Seal {
    /// Everything between the Arrow data and the Arrow footer: the table of batches, the checksums
    /// of the data's blocks, and the tail.
    pub fn encode(&self, batches: &[Batch], crcs: &[u8], footer: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = batches.iter().flat_map(|batch| batch.to_bytes()).collect();
        bytes.extend_from_slice(crcs);
        bytes.resize(aligned(bytes.len()), 0);
        let length = self.data + (bytes.len() + TAIL + footer.len()) as u64;
        let numbers = [self.rows, self.tokens, self.data, length].map(u64::to_le_bytes);
        let small = [
            self.kind as u32,
            batches.len() as u32,
            crc32c::crc32c(&bytes),
            crc32c::crc32c(footer),
        ]
        .map(u32::to_le_bytes);
        let tail = [
            MAGIC.as_slice(),
            &VERSION.to_le_bytes(),
            &ENDIAN_TAG.to_le_bytes(),
            &self.fingerprint,
            numbers.as_flattened(),
            small.as_flattened(),
        ];
        bytes.extend(with_checksum(&tail, TAIL));
        bytes
    }
}

/// A seal whose checksums matched.
pub struct CheckedSeal {
    pub batches: Vec<Batch>,
    /// Number of the first row of each batch, and of all rows at last.
    pub starts: Vec<u64>,
    pub tokens: u64,
    /// Bytes of Arrow data.
    pub data: usize,
    /// Checksums of its blocks.
    pub crcs: Vec<u32>,
    /// CRC32C of the tail.
    pub crc: u32,
}

/// Reads and checks the seal and the footer of a file of `length` bytes.
pub fn read(cache: &Cache, path: &Path, bytes: &FileBytes, length: usize) -> Result<CheckedSeal> {
    let reader = SealReader {
        path,
        bytes,
        length,
    };
    let (tail, footer) = reader.tail()?;
    reader.check_tail(&tail, cache)?;
    reader.check_footer(&tail, footer)?;
    let (batches, crcs) = reader.tables(&tail, footer)?;
    Ok(CheckedSeal {
        starts: reader.starts(&tail, &batches, cache.kind)?,
        batches,
        tokens: u64_at(&tail, TOKENS_AT),
        data: u64_at(&tail, DATA_AT) as usize,
        crcs,
        crc: u32_at(&tail, TAIL - 4),
    })
}

/// A shard while its seal is checked.
struct SealReader<'a> {
    path: &'a Path,
    bytes: &'a FileBytes,
    length: usize,
}

impl SealReader<'_> {
    fn refuse(&self, reason: impl Into<String>) -> Error {
        Error::cache(self.path, reason)
    }

    fn read(&self, at: usize, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.bytes.read(self.path, at, &mut bytes)?;
        Ok(bytes)
    }

    /// The seal's tail, and the length of the footer after it.
    fn tail(&self) -> Result<(Vec<u8>, usize)> {
        let no_seal = || {
            let length = self.length;
            self.refuse(format!(
                "its {length} bytes do not end in a seal and an Arrow footer"
            ))
        };
        let end = self.length.checked_sub(ARROW_END).ok_or_else(no_seal)?;
        let end = self.read(end, ARROW_END)?;
        let footer = (u32_at(&end, 0) as usize).saturating_add(ARROW_END);
        let at = self.length.checked_sub(footer.saturating_add(TAIL));
        let tail = self.read(at.ok_or_else(no_seal)?, TAIL)?;
        if !end.ends_with(b"ARROW1") || !tail.starts_with(MAGIC) {
            return Err(no_seal());
        }
        Ok((tail, footer))
    }

    fn check_tail(&self, tail: &[u8], cache: &Cache) -> Result<()> {
        let version = u32_at(tail, VERSION_AT);
        let length = u64_at(tail, LENGTH_AT);
        let found = &tail[FINGERPRINT_AT..ROWS_AT];
        let reason = if u32_at(tail, ENDIAN_AT) == ENDIAN_TAG.swap_bytes() {
            "it was written on a big-endian machine".into()
        } else if !checksum_matches(tail) {
            "the seal's checksum does not match".into()
        } else if version != VERSION {
            format!("shard version {version}, this library reads {VERSION}")
        } else if length != self.length as u64 {
            format!("it has {} bytes, and {length} were written", self.length)
        } else if found != cache.fingerprint {
            let (found, wanted) = (Hex(found), Hex(&cache.fingerprint));
            format!("it belongs to reference {found}, not to {wanted}")
        } else if let Some(reason) = wrong_kind(u32_at(tail, KIND_AT), cache.kind) {
            reason
        } else {
            return Ok(());
        };
        Err(self.refuse(reason))
    }

    fn check_footer(&self, tail: &[u8], footer: usize) -> Result<()> {
        let footer = self.read(self.length - footer, footer)?;
        if crc32c::crc32c(&footer) != u32_at(tail, FOOTER_CRC_AT) {
            return Err(self.refuse("the checksum of its Arrow footer does not match"));
        }
        Ok(())
    }

    /// The batches, and the checksums of the data's blocks.
    fn tables(&self, tail: &[u8], footer: usize) -> Result<(Vec<Batch>, Vec<u32>)> {
        let wrong = || self.refuse("the tables of its seal do not fit");
        let data = u64_at(tail, DATA_AT) as usize;
        let end = self.length - footer - TAIL;
        let room = end.checked_sub(data).ok_or_else(wrong)?;
        let batches = u32_at(tail, BATCHES_AT) as usize * BATCH;
        let crcs = block_count(data) * 4;
        if aligned(batches + crcs) != room {
            return Err(wrong());
        }
        let bytes = self.read(data, room)?;
        if crc32c::crc32c(&bytes) != u32_at(tail, TABLES_CRC_AT) {
            return Err(self.refuse("the checksum of its tables does not match"));
        }
        let (batches, rest) = bytes.split_at(batches);
        let crcs = rest[..crcs].as_chunks().0.iter();
        Ok((
            batches.chunks_exact(BATCH).map(Batch::from_bytes).collect(),
            crcs.map(|&crc| u32::from_le_bytes(crc)).collect(),
        ))
    }

    /// Number of the first row of each batch, and of all rows. Every column is checked to
    /// be in the data, so that no offset into a column can overflow.
    fn starts(&self, tail: &[u8], batches: &[Batch], kind: ValueKind) -> Result<Vec<u64>> {
        let data = u64_at(tail, DATA_AT);
        if !batches.iter().all(|batch| batch.fits(kind, data)) {
            return Err(self.refuse("a batch lies outside its data"));
        }
        let mut starts = vec![0_u64];
        for batch in batches {
            starts.push(starts[starts.len() - 1].saturating_add(batch.rows));
        }
        let (rows, tokens) = (starts[batches.len()], u64_at(tail, TOKENS_AT));
        let possible = match kind {
            ValueKind::PerToken => data / 4,
            ValueKind::Sums => rows.saturating_mul(u32::MAX.into()),
        };
        if rows != u64_at(tail, ROWS_AT) || tokens > possible {
            return Err(self.refuse("its batches do not have the rows of the whole"));
        }
        Ok(starts)
    }
}
