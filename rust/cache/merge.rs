//! All sources as one sequence of keys, each once.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{Kind, source::Source};
use crate::{Error, Result, fingerprint::Key};

/// A key, and the first of its records.
#[derive(Clone, Copy, Debug)]
pub struct Found {
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
    pub fn next(&mut self) -> Result<Option<Found>> {
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
        Ok(Some(Found {
            key,
            source,
            row,
            last,
            repeats,
        }))
    }
}

/// Number of different keys, after all records of each were compared.
pub fn count(agreement: Agreement, sources: &[Source]) -> Result<u64> {
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
    pub kind: Kind,
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
            Kind::PerToken => self.tolerance,
            Kind::Sums => self.tolerance * f64::from(one.0.max(1)).sqrt(),
        };
        let close = |(one, other): (&f64, &f64)| (one - other).abs() <= most;
        one.0 == other.0 && one.1.iter().zip(&other.1).all(close)
    }

    /// Number of tokens and values of a record.
    fn read(self, (source, row): (&Source, u64)) -> Result<(u32, Vec<f64>)> {
        let mut values = Vec::new();
        if self.kind == Kind::Sums {
            let tokens = source.values(self.kind, row, &mut values)?;
            return Ok((tokens, values));
        }
        let mut logps: Vec<f32> = Vec::new();
        let tokens = source.values(self.kind, row, &mut logps)?;
        Ok((tokens, logps.into_iter().map(f64::from).collect()))
    }
}
