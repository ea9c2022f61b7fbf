//! A group's shingles as 64-bit hashes: two shingles are taken for equal where their hashes are.

use std::cmp::Ordering;

use crate::store::StoredGroup;

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
