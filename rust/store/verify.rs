//! Everything in a store compared with everything it should be.

use std::ops::Range;

use super::{
    column_writer::digest,
    format::{Column, Columns, WEIGHTED},
    reader::{Store, read_roles},
};
use crate::{Result, parallel};

/// Ranges that an error lists.
const LISTED: usize = 8;
/// Blocks, and values, that a thread takes at least.
const BLOCKS: usize = 16;
const VALUES: usize = 1 << 20;

impl Store {
    /// Reads every byte: compares all blocks with their checksums, whatever was read before, then
    /// offsets, ids, masks, roles and values with what they may be, and the columns with the digest.
    pub fn verify(&self) -> Result<()> {
        self.verify_blocks()?;
        for column in [
            Column::PromptOffsets,
            Column::CompletionOffsets,
            Column::GroupOffsets,
        ] {
            self.offsets(column)?;
        }
        read_roles(self, 0..self.completions())?;
        self.values()?;
        self.metadata()?;
        let ids: &[i32] = self.read(Column::Tokens, 0..self.tokens())?;
        self.all(Column::Tokens, ids, |&id| id >= 0)?;
        let mask: &[u8] = self.read(Column::Mask, 0..self.counts().completion_tokens)?;
        if self.frame.version < WEIGHTED {
            self.all(Column::Mask, mask, |&value| value <= 1)?;
        }
        self.verify_digest()
    }

    fn verify_blocks(&self) -> Result<()> {
        let bad = parallel::ranges(self.blocks.len(), BLOCKS, |blocks| {
            let bad = |&block: &usize| !self.blocks.check(&self.map, block);
            blocks.filter(bad).collect::<Vec<_>>()
        });
        let bad = bad.concat();
        if bad.is_empty() {
            return Ok(());
        }
        let ranges = joined(bad.iter().map(|&block| self.blocks.range(block)));
        let listed = ranges.iter().take(LISTED);
        let named: Vec<_> = listed.map(|range| self.describe(range)).collect();
        let more = ranges.len() - named.len();
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        Err(self.corrupt(format!(
            "{} of {} blocks do not match their checksums: {}{more}",
            bad.len(),
            self.blocks.len(),
            named.join(", "),
        )))
    }

    fn all<T: Sync>(&self, column: Column, values: &[T], allowed: fn(&T) -> bool) -> Result<()> {
        let found = parallel::ranges(values.len(), VALUES, |range| {
            let wrong = values[range.clone()]
                .iter()
                .position(|value| !allowed(value));
            wrong.map(|at| range.start + at)
        });
        match found.into_iter().flatten().next() {
            None => Ok(()),
            Some(at) => {
                let name = column.name();
                Err(self.corrupt(format!("value {at} of {name} is impossible")))
            }
        }
    }

    fn verify_digest(&self) -> Result<()> {
        let hashes = parallel::ranges(Column::HASHED, 1, |columns| {
            let bytes = columns.map(|column| &self.map[self.frame.places.columns[column].clone()]);
            bytes
                .map(|bytes| blake3::hash(bytes).into())
                .collect::<Vec<_>>()
        });
        if digest(hashes.concat().into_iter()) == self.digest() {
            return Ok(());
        }
        Err(self.corrupt("the columns do not have the digest that header and footer say".into()))
    }
}

/// Ranges in order, those that touch as one.
fn joined(ranges: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    ranges.fold(Vec::new(), |mut all: Vec<Range<usize>>, range| {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
        all
    })
}
