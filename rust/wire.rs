//! Little-endian integers at fixed places, and the alignment of every file of this crate.

use std::fmt;

/// Columns, blocks and values start at a multiple of this many bytes.
pub const ALIGNMENT: usize = 64;

/// Stored in every header; reads as `0x04030201` where bytes were written the other way round.
pub const ENDIAN_TAG: u32 = 0x0102_0304;

/// The next multiple of [`ALIGNMENT`].
pub fn aligned(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT)
}

/// The integer at byte `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The integer at byte `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Joins `parts`, fills up with zeros and ends with the CRC32C of everything before: `length` bytes.
pub fn signed(parts: &[&[u8]], length: usize) -> Vec<u8> {
    let mut bytes = parts.concat();
    debug_assert!(bytes.len() + 4 <= length, "the parts fill the header");
    bytes.resize(length - 4, 0);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Whether the last four bytes are the CRC32C of those before.
pub fn is_signed(bytes: &[u8]) -> bool {
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    crc32c::crc32c(body).to_le_bytes() == crc
}

/// Bytes as a person compares them.
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
