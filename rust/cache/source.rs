//! One file of records, sealed or not, as rows in the order of their keys.

use std::path::Path;

use bytemuck::Pod;

use super::{Kind, journal_table::JournalTable, shard::Shard};
use crate::{Error, Result, content_key::Key};

/// Where the values of a record lie in its file, and how many tokens it has.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub at: u64,
    pub tokens: u32,
}

/// A file of records.
#[derive(Debug)]
pub enum Source {
    Shard(Shard),
    Journal(JournalTable),
}

impl Source {
    pub fn path(&self) -> &Path {
        match self {
            Self::Shard(shard) => shard.path(),
            Self::Journal(journal) => journal.path(),
        }
    }

    pub fn is_journal(&self) -> bool {
        matches!(self, Self::Journal(_))
    }

    /// Its name in the folder.
    pub fn name(&self) -> &str {
        let name = self.path().file_name().and_then(|name| name.to_str());
        name.unwrap_or_default()
    }

    pub fn rows(&self) -> u64 {
        match self {
            Self::Shard(shard) => shard.rows(),
            Self::Journal(journal) => journal.rows(),
        }
    }

    /// Number of tokens of all rows.
    pub fn all_tokens(&self) -> u64 {
        match self {
            Self::Shard(shard) => shard.tokens,
            Self::Journal(journal) => journal.all_tokens(),
        }
    }

    pub fn length(&self) -> u64 {
        match self {
            Self::Shard(shard) => shard.length,
            Self::Journal(journal) => journal.length,
        }
    }

    /// Bytes behind the last whole block of a journal.
    pub fn torn(&self) -> u64 {
        match self {
            Self::Shard(_) => 0,
            Self::Journal(journal) => journal.torn,
        }
    }

    pub fn key(&self, row: u64) -> Result<Key> {
        match self {
            Self::Shard(shard) => shard.key(row),
            Self::Journal(journal) => Ok(journal.key(row)),
        }
    }

    /// Where a row's values lie.
    pub fn span(&self, row: u64) -> Result<Span> {
        match self {
            Self::Shard(shard) => shard.span(row),
            Self::Journal(journal) => Ok(journal.span(row)),
        }
    }

    /// Reaches for what [`Self::span`] will read of a shard.
    pub fn touch_span(&self, row: u64) {
        if let Self::Shard(shard) = self {
            shard.touch_span(row);
        }
    }

    /// Reaches for what [`Self::fill`] will read of a shard.
    pub fn touch_values(&self, span: Span) {
        if let Self::Shard(shard) = self {
            shard.touch_values(span);
        }
    }

    /// Fills `out` with a row's values, as they lie in the file.
    pub fn fill(&self, span: Span, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Shard(shard) => shard.fill(span, out),
            Self::Journal(journal) => journal.fill(span, out),
        }
    }

    /// Appends the values of a row to `out`, after a look at each; returns its number of tokens.
    pub fn values<T: Pod>(&self, kind: Kind, row: u64, out: &mut Vec<T>) -> Result<u32> {
        let span = self.span(row)?;
        let before = out.len();
        out.resize(
            before + kind.bytes(span.tokens) / size_of::<T>(),
            T::zeroed(),
        );
        let bytes = bytemuck::cast_slice_mut(&mut out[before..]);
        self.fill(span, bytes)?;
        self.check(kind, row, bytes)?;
        Ok(span.tokens)
    }

    /// Refuses values that cannot be log-probs.
    pub fn check(&self, kind: Kind, row: u64, values: &[u8]) -> Result<()> {
        match kind.impossible(values) {
            None => Ok(()),
            Some((at, value)) => {
                let reason = format!("value {at} of record {row} is {value}, which is no log-prob");
                Err(Error::cache(self.path(), reason))
            }
        }
    }

    /// The first row at `from` or later whose key is not below `key`: near `from` in few steps.
    pub fn lower_bound(&self, from: u64, key: &Key) -> Result<u64> {
        let rows = self.rows();
        let (mut below, mut step) = (from, 1);
        // Doubling steps until a row is not below, or the end.
        let mut bound = from;
        while bound < rows && self.key(bound)? < *key {
            below = bound + 1;
            bound = bound.saturating_add(step).min(rows);
            step *= 2;
        }
        while below < bound {
            let middle = below + (bound - below) / 2;
            if self.key(middle)? < *key {
                below = middle + 1;
            } else {
                bound = middle;
            }
        }
        Ok(below)
    }
}
