//! What is scored, in flat group-major order: equal in both layouts.

use super::{Batch, shared::take};

pub(super) fn target_ids(batch: &Batch<'_>, mut out: &mut [i64]) {
    for group in &batch.groups {
        widen(
            take(&mut out, group.tokens.len() - group.prompt_length),
            &group.tokens[group.prompt_length..],
        );
    }
}

pub(super) fn completion_mask(batch: &Batch<'_>, mut out: &mut [u8]) {
    for completion in &batch.completions {
        let values = take(&mut out, completion.mask.len());
        // Whatever else a damaged file may hold, a bool is 0 or 1.
        for (slot, &value) in values.iter_mut().zip(completion.mask) {
            *slot = u8::from(value != 0);
        }
    }
}

pub(super) fn completion_of(batch: &Batch<'_>, mut out: &mut [i64]) {
    for (number, completion) in (0..).zip(&batch.completions) {
        take(&mut out, completion.ids.len()).fill(number);
    }
}

pub(super) fn completion_offsets(batch: &Batch<'_>, out: &mut [i64]) {
    let mut end = 0;
    out[0] = 0;
    for (slot, completion) in out[1..].iter_mut().zip(&batch.completions) {
        end += completion.ids.len() as i64;
        *slot = end;
    }
}

pub(super) fn prompt_lengths(batch: &Batch<'_>, out: &mut [i64]) {
    for (slot, group) in out.iter_mut().zip(&batch.groups) {
        *slot = group.prompt_length as i64;
    }
}

pub(super) fn completion_lengths(batch: &Batch<'_>, out: &mut [i64]) {
    for (slot, completion) in out.iter_mut().zip(&batch.completions) {
        *slot = completion.ids.len() as i64;
    }
}

pub(super) fn group_sizes(batch: &Batch<'_>, out: &mut [i64]) {
    for (slot, group) in out.iter_mut().zip(&batch.groups) {
        *slot = group.roles().len() as i64;
    }
}

pub(super) fn roles(batch: &Batch<'_>, mut out: &mut [u8]) {
    for group in &batch.groups {
        take(&mut out, group.roles().len()).copy_from_slice(group.roles());
    }
}

pub(super) fn completions(batch: &Batch<'_>, mut out: &mut [i64]) {
    for group in &batch.groups {
        count(take(&mut out, group.roles().len()), group.first as i64);
    }
}

/// Ids as the 64-bit numbers that models index with.
pub(super) fn widen(out: &mut [i64], ids: &[i32]) {
    for (slot, &id) in out.iter_mut().zip(ids) {
        *slot = i64::from(id);
    }
}

/// `first`, `first + 1`, ….
pub(super) fn count(out: &mut [i64], first: i64) {
    for (slot, number) in out.iter_mut().zip(first..) {
        *slot = number;
    }
}

/// The bytes of a mask as numbers.
pub(super) fn widen_mask(out: &mut [i64], mask: &[u8]) {
    for (slot, &value) in out.iter_mut().zip(mask) {
        *slot = i64::from(value != 0);
    }
}
