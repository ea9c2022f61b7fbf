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
    let mut rows = vec![-1; keys.len()];
    let order = sorted(keys);
    for (number_of_source, source) in sources.iter().enumerate() {
        let mut at = 0;
        for &(_, index) in &order {
            let (key, found) = (&keys[index as usize], &mut rows[index as usize]);
            at = source.lower_bound(at, key)?;
            if at == source.rows() {
                break;
            }
            if source.key(at)? != *key {
                continue;
            }
            if *found == -1 {
                *found = number(number_of_source, at);
            } else {
                agreement.check(place(sources, *found)?, (source, at))?;
            }
            // Keys of shards stand once; a journal has them as they came.
            let mut next = at + 1;
            while source.is_journal() && next < source.rows() && source.key(next)? == *key {
                agreement.check(place(sources, *found)?, (source, next))?;
                next += 1;
            }
        }
    }
    Ok(rows)
}

/// The keys' first eight bytes and places, in the order of the keys.
fn sorted(keys: &[Key]) -> Vec<(u64, u64)> {
    let prefix = |key: &Key| big_endian(*key.first_chunk().expect("32 bytes"));
    let mut order: Vec<(u64, u64)> = keys.iter().map(prefix).zip(0..).collect();
    order.sort_unstable_by(|one, other| {
        let whole = || keys[one.1 as usize].cmp(&keys[other.1 as usize]);
        one.0.cmp(&other.0).then_with(whole)
    });
    order
}

/// Bytes compare as the number does whose first digit is the first byte.
fn big_endian(bytes: [u8; 8]) -> u64 {
    u64::from_le_bytes(bytes).swap_bytes()
}
