//! `MinHash` bands: groups that agree in one of them are candidates.

use super::{Request, in_parallel, shingles};
use crate::{Result, store::Store};

/// Bands that are made in one pass over the tokens.
pub(super) const AT_ONCE: usize = 4;
const CAUGHT: f64 = 0.995; // of pairs at the threshold, in theory
const MOST_LANES: usize = 64; // hashes of a shingle, over all bands
const MOST_AT_ALL: usize = 256; // below a threshold of 0.02 some more are missed
const MOST_ROWS: u8 = 8;

/// How many bands of how many hashes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Bands {
    pub(super) count: usize,
    pub(super) rows: usize,
}

impl Bands {
    /// The most rows a band (fewest chance candidates) that catch pairs at the threshold.
    pub(super) fn catching(threshold: f64) -> Self {
        let bands = |rows: u8| Self {
            count: bands_needed(threshold.powi(rows.into())),
            rows: rows.into(),
        };
        let fitting = (1..=MOST_ROWS).rev().map(bands);
        let mut fitting = fitting.filter(|bands| bands.count * bands.rows <= MOST_LANES);
        fitting.next().unwrap_or_else(|| bands(1))
    }

    /// How many bands are made together with band `first`.
    pub(super) fn together(self, first: usize) -> usize {
        AT_ONCE.min(self.count - first)
    }

    /// The keys of every group in the bands from `first`, `[G, together]`: equal keys are equal
    /// bands, or one chance in 2^32.
    pub(super) fn keys(self, store: &Store, request: &Request, first: usize) -> Result<Vec<u32>> {
        let count = self.together(first);
        let lanes = (first * self.rows..(first + count) * self.rows).map(multiplier);
        let lanes: Vec<u64> = lanes.collect();
        let mut keys = vec![0; store.len() * count];
        let share = store.len().div_ceil(request.threads).max(1);
        let parts = keys.chunks_mut(share * count).enumerate().collect();
        let fill = |(part, keys): (usize, &mut [u32])| {
            let mut lowest = vec![0u32; lanes.len()];
            for (index, keys) in keys.chunks_mut(count).enumerate() {
                let index = (part * share + index) as i64;
                lower(store, index, request.shingle, &lanes, &mut lowest)?;
                let bands = lowest.chunks(self.rows).map(key);
                keys.iter_mut().zip(bands).for_each(|(to, key)| *to = key);
            }
            Ok(())
        };
        in_parallel(parts, fill)
            .into_iter()
            .collect::<Result<()>>()?;
        Ok(keys)
    }
}

/// Fills `lowest` with the least value that each lane's hash takes in a group.
fn lower(
    store: &Store,
    index: i64,
    shingle: usize,
    lanes: &[u64],
    lowest: &mut [u32],
) -> Result<()> {
    lowest.fill(u32::MAX);
    shingles::for_each(store.group(index)?, shingle, |hash| {
        for (least, lane) in lowest.iter_mut().zip(lanes) {
            *least = (*least).min((hash.wrapping_mul(*lane) >> 32) as u32);
        }
    });
    Ok(())
}

/// Of one band's keys: group numbers in the low half, keys in the high half, sorted.
pub(super) fn sorted(keys: impl Iterator<Item = u32>) -> Vec<u64> {
    let entry = |(index, key): (usize, u32)| u64::from(key) << 32 | index as u64;
    let mut entries: Vec<u64> = keys.enumerate().map(entry).collect();
    entries.sort_unstable();
    entries
}

/// Bands in which a pair must be looked for that agrees in each with probability `agrees`.
fn bands_needed(agrees: f64) -> usize {
    let mut missed = 1.0 - agrees;
    let mut count = 1;
    while missed > 1.0 - CAUGHT && count < MOST_AT_ALL {
        missed *= 1.0 - agrees;
        count += 1;
    }
    count
}

/// A lane's odd multiplier: hashes are well mixed already, so multiply-shift is enough.
fn multiplier(lane: usize) -> u64 {
    shingles::mix(lane as u64 + 1) | 1
}

fn key(band: &[u32]) -> u32 {
    let joined = band.iter().fold(0, |hash, &least| {
        shingles::mix(hash ^ u64::from(least)).wrapping_add(1)
    });
    (joined >> 32) as u32
}
