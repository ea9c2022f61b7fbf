//! A group's shingles as 64-bit hashes, and the `MinHash` bands made from them.
//!
//! Two shingles count as equal where their hashes are equal. Groups that agree in a band are
//! candidates, whose sets of shingles are then compared.

use std::cmp::Ordering;

use crate::{
    Result, parallel,
    store::{Store, StoredGroup},
};

/// What counts as similar.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Least Jaccard index of two similar groups, in (0, 1].
    pub threshold: f64,
    /// Tokens in a shingle: at least one.
    pub shingle: usize,
    /// Threads to use: at least one.
    pub threads: usize,
}

const BASE: u64 = 0x9e37_79b9_7f4a_7c15 | 1;

/// Spreads the bits of a number (the finaliser of `SplitMix64`).
pub(super) fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Calls `each` with the hash of every window of `width` tokens in the prompt and in each completion.
///
/// A text shorter than the window is one shingle.
pub(super) fn for_each(group: StoredGroup<'_>, width: usize, mut each: impl FnMut(u64)) {
    windows(group.prompt(), width, &mut each);
    for completion in group.completions() {
        windows(completion.ids, width, &mut each);
    }
}

/// A rolling polynomial hash; each power of `BASE` is odd, so no token is lost in it.
fn windows(ids: &[i32], width: usize, each: &mut impl FnMut(u64)) {
    let width = width.min(ids.len());
    let spread = |id: i32| mix(u64::from(id.cast_unsigned()).wrapping_add(BASE));
    let leaving = (0..width).fold(1u64, |power, _| power.wrapping_mul(BASE));
    let mut hash = 0u64;
    for (at, &id) in ids.iter().enumerate() {
        hash = hash.wrapping_mul(BASE).wrapping_add(spread(id));
        if at >= width {
            hash = hash.wrapping_sub(spread(ids[at - width]).wrapping_mul(leaving));
        }
        if at + 1 >= width {
            each(mix(hash));
        }
    }
}

/// The sorted set of a group's shingles.
pub(super) fn set(group: StoredGroup<'_>, width: usize) -> Vec<u64> {
    let mut hashes = Vec::with_capacity(group.tokens.len());
    for_each(group, width, |hash| hashes.push(hash));
    hashes.sort_unstable();
    hashes.dedup();
    hashes
}

/// Whether sets of these sizes can have a Jaccard index of `threshold`, with `shared` in common.
pub(super) fn reaches(shared: usize, left: usize, right: usize, threshold: f64) -> bool {
    let union = left + right - shared;
    real(shared) / real(union) >= threshold // 4 of 5 is 0.8, as a person writes it
}

/// The Jaccard index of two sorted sets, or None where it is below `threshold`.
pub(super) fn similarity(left: &[u64], right: &[u64], threshold: f64) -> Option<f32> {
    let (mut i, mut j, mut shared) = (0, 0, 0);
    let can_reach = |shared| reaches(shared, left.len(), right.len(), threshold);
    while i < left.len() && j < right.len() {
        if !can_reach(shared + (left.len() - i).min(right.len() - j)) {
            return None; // what is left is not enough
        }
        match left[i].cmp(&right[j]) {
            Ordering::Less => i += 1,
            Ordering::Greater => j += 1,
            Ordering::Equal => (i, j, shared) = (i + 1, j + 1, shared + 1),
        }
    }
    let union = left.len() + right.len() - shared;
    can_reach(shared).then(|| (real(shared) / real(union)) as f32)
}

fn real(count: usize) -> f64 {
    f64::from(count as u32) // a group has less than 2^32 tokens
}

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
        parallel::each(parts, fill)
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
    for_each(store.group(index)?, shingle, |hash| {
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
    mix(lane as u64 + 1) | 1
}

fn key(band: &[u32]) -> u32 {
    let joined = band.iter().fold(0, |hash, &least| {
        mix(hash ^ u64::from(least)).wrapping_add(1)
    });
    (joined >> 32) as u32
}
