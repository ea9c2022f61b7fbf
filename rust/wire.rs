//! Little-endian integers at fixed places, and the alignment of every file of this crate.

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

/// Writes `value` at the front of `bytes` and moves `bytes` behind it.
pub fn put(bytes: &mut &mut [u8], value: &[u8]) {
    let (front, rest) = std::mem::take(bytes).split_at_mut(value.len());
    front.copy_from_slice(value);
    *bytes = rest;
}

/// Sets the last four bytes to the CRC32C of those before.
pub fn sign(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// Whether the last four bytes are the CRC32C of those before.
pub fn signed(bytes: &[u8]) -> bool {
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    crc32c::crc32c(body).to_le_bytes() == crc
}
