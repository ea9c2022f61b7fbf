//! A record batch of a shard, as the seal has it.

use super::Kind;
use crate::wire::u64_at;

/// Where the columns of one record batch lie in the file.
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

    /// Whether all columns lie in the first `data` bytes.
    pub fn fits(&self, kind: Kind, data: u64) -> bool {
        let (tokens, values) = match kind {
            Kind::PerToken => (self.rows.saturating_add(1), self.values),
            Kind::Sums => (self.rows, self.rows),
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
