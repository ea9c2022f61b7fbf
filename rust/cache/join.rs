//! Keys to rows, once for a data set.

use super::{merge::Agreement, source::Source};
use crate::{Error, Result, fingerprint::Key};

/// Bits of a row's number within its source; the source's number stands above them.
const ROW_BITS: u32 = 40;

/// A row of a source as one number.
fn number(source: usize, row: u64) -> i64 {
    ((source as i64) << ROW_BITS) | row as i64
}

/// The source and the row in it that a number names.
pub fn place(sources: &[Source], number: i64) -> Result<(&Source, u64)> {
    let row = number.cast_unsigned() & ((1 << ROW_BITS) - 1);
    let source = usize::try_from(number >> ROW_BITS).ok();
    let source = source.and_then(|source| sources.get(source));
    let found = source.filter(|source| row < source.rows());
    found
        .map(|source| (source, row))
        .ok_or_else(|| Error::OutOfRange {
            what: "row",
            index: number,
            count: sources.iter().map(Source::rows).sum::<u64>() as usize,
        })
}

/// The row of each key, -1 where there is none. Both sides are walked in the order of the keys.
///
/// A key that several sources hold must have one value.
pub fn join(agreement: Agreement, sources: &[Source], keys: &[Key]) -> Result<Vec<i64>> {
    let mut join = Join {
        agreement,
        sources,
        keys,
        rows: vec![-1; keys.len()],
    };
    let order = sorted(keys);
    for source in 0..sources.len() {
        join.walk(source, &order)?;
    }
    Ok(join.rows)
}

struct Join<'a> {
    agreement: Agreement,
    sources: &'a [Source],
    keys: &'a [Key],
    rows: Vec<i64>,
}

impl Join<'_> {
    /// Finds the keys of one source. Heads of keys are compared, which lie in the order walked; a
    /// whole key is a jump through memory, and looked at only where its head is there.
    fn walk(&mut self, number: usize, order: &[(u64, u64)]) -> Result<()> {
        let source = &self.sources[number];
        let (mut at, mut current) = (0, 0);
        if source.rows() > 0 {
            current = head(&source.key(0)?);
        }
        for &(wanted, index) in order {
            if wanted > current && at < source.rows() {
                at = source.lower_bound(at, &first_key(wanted))?;
                if at < source.rows() {
                    current = head(&source.key(at)?);
                }
            }
            if at == source.rows() {
                break;
            }
            if wanted == current {
                self.take(number, at, index as usize)?;
            }
        }
        Ok(())
    }

    /// Looks for a key among the rows from `at` on.
    fn take(&mut self, number: usize, at: u64, index: usize) -> Result<()> {
        let (source, key) = (&self.sources[number], &self.keys[index]);
        let mut row = source.lower_bound(at, key)?;
        // Keys of shards stand once; a journal has them as they came.
        while row < source.rows() && source.key(row)? == *key {
            let found = &mut self.rows[index];
            if *found == -1 {
                *found = self::number(number, row);
            } else {
                let one = place(self.sources, *found)?;
                self.agreement.check(one, (source, row))?;
            }
            row += 1;
        }
        Ok(())
    }
}

/// The keys' heads and places, in the order of the keys.
fn sorted(keys: &[Key]) -> Vec<(u64, u64)> {
    let mut order: Vec<(u64, u64)> = keys.iter().map(head).zip(0..).collect();
    order.sort_unstable_by(|one, other| {
        let whole = || keys[one.1 as usize].cmp(&keys[other.1 as usize]);
        one.0.cmp(&other.0).then_with(whole)
    });
    order
}

/// The first eight bytes as a number that compares as they do.
fn head(key: &Key) -> u64 {
    u64::from_le_bytes(*key.first_chunk().expect("32 bytes")).swap_bytes()
}

/// The smallest key with this head.
fn first_key(head: u64) -> Key {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&head.swap_bytes().to_le_bytes());
    key
}
