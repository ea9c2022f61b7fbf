//! One file of records, sealed or not, as rows in the order of their keys.

use std::path::Path;

use bytemuck::Pod;

use super::{journal_table::JournalTable, shard::Shard};
use crate::{Result, fingerprint::Key};

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

    /// Number of tokens of a row.
    pub fn tokens(&self, row: u64) -> Result<u32> {
        match self {
            Self::Shard(shard) => shard.tokens(row),
            Self::Journal(journal) => Ok(journal.tokens(row)),
        }
    }

    /// Appends the values of a row to `out`; returns its number of tokens.
    pub fn values<T: Pod>(&self, row: u64, out: &mut Vec<T>) -> Result<u32> {
        match self {
            Self::Shard(shard) => shard.values(row, out),
            Self::Journal(journal) => journal.values(row, out),
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
