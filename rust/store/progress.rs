//! The small file that a checkpoint is.

use super::columns::{Column, Counts};
use crate::wire::{self, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"LRSTOREP";
const VERSION: u32 = 2;
/// `repeats` of a writer that does not deduplicate.
const NO_REPEATS: u64 = u64::MAX;

const COUNTS_AT: usize = MAGIC.len() + 8;
const REPEATS_AT: usize = COUNTS_AT + 4 * 8;
const NOTE_AT: usize = REPEATS_AT + 8;
const HASHES_AT: usize = NOTE_AT + 8;

/// What a writer held when a checkpoint was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Their metadata are 0.
    pub counts: Counts,
    /// Duplicates left out; `None` where the writer does not deduplicate.
    pub repeats: Option<usize>,
    /// Hash of each column, then of the duplicates' groups if there are any.
    pub hashes: Vec<[u8; 32]>,
    /// The caller's text.
    pub note: String,
}

impl Progress {
    pub fn encode(&self) -> Vec<u8> {
        let Counts {
            groups,
            completions,
            tokens,
            completion_tokens,
            metadata: _,
        } = self.counts;
        let numbers = [groups, completions, tokens, completion_tokens];
        let numbers = numbers.map(|count| (count as u64).to_le_bytes());
        let repeats = self.repeats.map_or(NO_REPEATS, |count| count as u64);
        let note = self.note.as_bytes();
        let parts = [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &wire::ENDIAN_TAG.to_le_bytes(),
            numbers.as_flattened(),
            &repeats.to_le_bytes(),
            &(note.len() as u64).to_le_bytes(),
            self.hashes.as_flattened(),
            note,
        ];
        let length = HASHES_AT + 32 * self.hashes.len() + note.len() + 4;
        wire::signed(&parts, length)
    }

    /// `None` where the bytes are not a whole checkpoint of this version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let whole = bytes.len() >= HASHES_AT + 4
            && bytes.starts_with(MAGIC)
            && u32_at(bytes, MAGIC.len()) == VERSION
            && u32_at(bytes, MAGIC.len() + 4) == wire::ENDIAN_TAG
            && wire::is_signed(bytes);
        let count = |field: usize| u64_at(bytes, COUNTS_AT + 8 * field) as usize;
        let counts = whole.then(|| Counts {
            groups: count(0),
            completions: count(1),
            tokens: count(2),
            completion_tokens: count(3),
            metadata: 0,
        })?;
        let repeats = Some(u64_at(bytes, REPEATS_AT)).filter(|&count| count != NO_REPEATS);
        let hashes = 32 * (Column::HASHED + usize::from(repeats.is_some()));
        let rest = &bytes[HASHES_AT..bytes.len() - 4];
        let (hashes, note) = rest.split_at_checked(hashes)?;
        let same_length = note.len() as u64 == u64_at(bytes, NOTE_AT);
        (same_length && counts.are_possible()).then_some(())?;
        Some(Self {
            counts,
            repeats: repeats.map(|count| count as usize),
            hashes: hashes
                .chunks_exact(32)
                .map(|hash| hash.try_into().expect("32"))
                .collect(),
            note: String::from_utf8(note.to_vec()).ok()?,
        })
    }
}
