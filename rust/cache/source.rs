//! Files of records as rows in the order of their keys: one file, and all of them merged.

use std::{cmp::Reverse, collections::BinaryHeap, path::Path};

use bytemuck::Pod;

use super::{
    folder::{Cache, Span, ValueKind},
    journal::JournalTable,
    shard::Shard,
};
use crate::{Error, Result, content_key::Key};

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

    /// Bytes after the last whole block of a journal.
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

    /// Where a row's values are.
    pub fn span(&self, row: u64) -> Result<Span> {
        match self {
            Self::Shard(shard) => shard.span(row),
            Self::Journal(journal) => Ok(journal.span(row)),
        }
    }

    /// Touches the memory that [`Self::span`] will read, so that many cache misses overlap.
    pub fn touch_span(&self, row: u64) {
        if let Self::Shard(shard) = self {
            shard.touch_span(row);
        }
    }

    /// Touches the memory that [`Self::fill`] will read.
    pub fn touch_values(&self, span: Span) {
        if let Self::Shard(shard) = self {
            shard.touch_values(span);
        }
    }

    /// Fills `out` with the bytes of a row's values.
    pub fn fill(&self, span: Span, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Shard(shard) => shard.fill(span, out),
            Self::Journal(journal) => journal.fill(span, out),
        }
    }

    /// Appends the values of a row to `out`, after checking each; returns the number of tokens.
    pub fn values<T: Pod>(&self, kind: ValueKind, row: u64, out: &mut Vec<T>) -> Result<u32> {
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
    pub fn check(&self, kind: ValueKind, row: u64, values: &[u8]) -> Result<()> {
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

/// A key, and the first of its records.
#[derive(Clone, Copy, Debug)]
pub struct MergedKey {
    pub key: Key,
    pub source: usize,
    pub row: u64,
    /// The last source that has this key.
    pub last: usize,
    /// Further records of this key.
    pub repeats: u64,
}

/// The keys of all sources in order.
pub struct Merged<'a> {
    agreement: Agreement,
    sources: &'a [Source],
    heads: BinaryHeap<Reverse<(Key, usize, u64)>>,
}

impl<'a> Merged<'a> {
    /// From the first key above `after` on, or from the first of all.
    pub fn new(agreement: Agreement, sources: &'a [Source], after: Option<&Key>) -> Result<Self> {
        let heads = BinaryHeap::with_capacity(sources.len());
        let mut merged = Self {
            agreement,
            sources,
            heads,
        };
        for (number, source) in sources.iter().enumerate() {
            let row = match after {
                None => 0,
                Some(key) => skip(source, key)?,
            };
            merged.push(number, row)?;
        }
        Ok(merged)
    }

    fn push(&mut self, source: usize, row: u64) -> Result<()> {
        if row < self.sources[source].rows() {
            let key = self.sources[source].key(row)?;
            self.heads.push(Reverse((key, source, row)));
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<Option<(Key, usize, u64)>> {
        let Some(Reverse((key, source, row))) = self.heads.pop() else {
            return Ok(None);
        };
        self.push(source, row + 1)?;
        Ok(Some((key, source, row)))
    }

    /// The next key. Records that contradict each other are an error.
    pub fn next(&mut self) -> Result<Option<MergedKey>> {
        let Some((key, source, row)) = self.pop()? else {
            return Ok(None);
        };
        let (mut last, mut repeats) = (source, 0);
        while self.heads.peek().is_some_and(|head| head.0.0 == key) {
            if let Some((_, other, other_row)) = self.pop()? {
                last = other;
                let (one, other) = (&self.sources[source], &self.sources[other]);
                self.agreement.check((one, row), (other, other_row))?;
            }
            repeats += 1;
        }
        Ok(Some(MergedKey {
            key,
            source,
            row,
            last,
            repeats,
        }))
    }
}

/// Number of different keys, after all records of each were compared.
pub fn count_keys(agreement: Agreement, sources: &[Source]) -> Result<u64> {
    let mut merged = Merged::new(agreement, sources, None)?;
    let mut keys = 0;
    while merged.next()?.is_some() {
        keys += 1;
    }
    Ok(keys)
}

/// The first row above `key`.
fn skip(source: &Source, key: &Key) -> Result<u64> {
    let mut row = source.lower_bound(0, key)?;
    while row < source.rows() && source.key(row)? == *key {
        row += 1;
    }
    Ok(row)
}

/// How far apart two records of one key may be.
#[derive(Clone, Copy, Debug)]
pub struct Agreement {
    pub kind: ValueKind,
    pub tolerance: f64,
}

impl Agreement {
    /// Two batches of one model round differently; anything beyond that is a contradiction.
    pub fn check(self, one: (&Source, u64), other: (&Source, u64)) -> Result<()> {
        let (first, second) = (self.read(one)?, self.read(other)?);
        if self.holds(&first, &second) {
            return Ok(());
        }
        let reason = format!(
            "its record {} contradicts the record {} of the same key in {}: one of the two was \
             not made by this reference",
            other.1,
            one.1,
            one.0.path().display()
        );
        Err(Error::cache(other.0.path(), reason))
    }

    fn holds(self, one: &(u32, Vec<f64>), other: &(u32, Vec<f64>)) -> bool {
        let most = match self.kind {
            ValueKind::PerToken => self.tolerance,
            ValueKind::Sums => self.tolerance * f64::from(one.0.max(1)).sqrt(),
        };
        let close = |(one, other): (&f64, &f64)| (one - other).abs() <= most;
        one.0 == other.0 && one.1.iter().zip(&other.1).all(close)
    }

    /// Number of tokens and values of a record.
    fn read(self, (source, row): (&Source, u64)) -> Result<(u32, Vec<f64>)> {
        let mut values = Vec::new();
        if self.kind == ValueKind::Sums {
            let tokens = source.values(self.kind, row, &mut values)?;
            return Ok((tokens, values));
        }
        let mut logps: Vec<f32> = Vec::new();
        let tokens = source.values(self.kind, row, &mut logps)?;
        Ok((tokens, logps.into_iter().map(f64::from).collect()))
    }
}

impl Cache {
    /// How far apart two of its records of one key may be.
    pub(super) fn agreement(&self) -> Agreement {
        Agreement {
            kind: self.kind,
            tolerance: f64::from(self.tolerance),
        }
    }
}
