//! A journal's bytes: encoded, decoded, and told apart from damage. `FORMAT.md` in code.

use super::{Fingerprint, Kind};
use crate::{
    content_key::Key,
    file_format::{self, ALIGNMENT, Hex, aligned, u32_at, u64_at},
};

pub const EXTENSION: &str = "journal";

const MAGIC: &[u8; 8] = b"LRJOURN1";
/// The newest version that is read; the kind's own is what a journal needs.
const VERSION: u32 = 2;
/// Length of the journal's header and of every block's.
pub const HEADER: usize = ALIGNMENT;

const VERSION_AT: usize = MAGIC.len();
const ENDIAN_AT: usize = VERSION_AT + 4;
const FINGERPRINT_AT: usize = ENDIAN_AT + 4;
const ID_AT: usize = FINGERPRINT_AT + 32;
const KIND_AT: usize = ID_AT + 8;
const CRC_AT: usize = HEADER - 4;

const BLOCK_MAGIC: &[u8; 8] = b"LRBLOCK1";
const JOURNAL_AT: usize = BLOCK_MAGIC.len();
pub const SEQUENCE_AT: usize = JOURNAL_AT + 8;
pub const PAYLOAD_AT: usize = SEQUENCE_AT + 8;
pub const RECORDS_AT: usize = PAYLOAD_AT + 8;
const PREVIOUS_AT: usize = RECORDS_AT + 4;
pub const PAYLOAD_CRC_AT: usize = PREVIOUS_AT + 4;

/// Journals of sums came with version 2.
fn version(kind: Kind) -> u32 {
    1 + kind as u32
}

/// The journal's first 64 bytes.
pub fn header(fingerprint: &Fingerprint, kind: Kind, id: u64) -> Vec<u8> {
    let [version, endian, kind] =
        [version(kind), file_format::ENDIAN_TAG, kind as u32].map(u32::to_le_bytes);
    let id = id.to_le_bytes();
    file_format::with_checksum(&[MAGIC, &version, &endian, fingerprint, &id, &kind], HEADER)
}

/// Why these 64 bytes do not begin a journal of this reference and kind.
pub fn refusal(header: &[u8], fingerprint: &Fingerprint, kind: Kind) -> Option<String> {
    let version = u32_at(header, VERSION_AT);
    let found = &header[FINGERPRINT_AT..ID_AT];
    if !header.starts_with(MAGIC) {
        Some("it does not begin with LRJOURN1".into())
    } else if u32_at(header, ENDIAN_AT) == file_format::ENDIAN_TAG.swap_bytes() {
        Some("it was written on a big-endian machine".into())
    } else if !file_format::checksum_matches(header) {
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

/// Why values with this number are not of `kind`.
pub fn wrong_kind(found: u32, kind: Kind) -> Option<String> {
    let name = Kind::from_number(found).map_or("unknown", Kind::name);
    (found != kind as u32).then(|| format!("it holds {name} values, not {}", kind.name()))
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

    /// Number of the next block.
    pub fn sequence(self) -> u64 {
        self.sequence
    }

    /// Goes on behind the block with this header.
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
        file_format::with_checksum(
            &[BLOCK_MAGIC, numbers.as_flattened(), small.as_flattened()],
            HEADER,
        )
    }

    /// Whether these 64 bytes are the header of some block of this journal.
    pub fn owns(self, header: &[u8]) -> bool {
        header.starts_with(BLOCK_MAGIC)
            && u64_at(header, JOURNAL_AT) == self.id
            && file_format::checksum_matches(header)
    }

    /// Whether these 64 bytes are the header of the next block.
    pub fn expects(self, header: &[u8]) -> bool {
        self.owns(header)
            && u64_at(header, SEQUENCE_AT) == self.sequence
            && u32_at(header, PREVIOUS_AT) == self.previous
    }
}
