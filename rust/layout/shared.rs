//! The shared-prompt layout: one row of prompt, completion 1, …, completion K, next group, ….
//!
//! The first token of every completion is predicted by the last position of its prompt. What is left
//! of a fixed width is filler: no target touches it, and it attends to nothing but itself.

use super::{
    Batch,
    targets::{count, widen, widen_mask},
};

/// The next `length` elements of `out`.
#[expect(clippy::mut_mut, reason = "`out` itself moves on")]
pub(super) fn take<'a, T>(out: &mut &'a mut [T], length: usize) -> &'a mut [T] {
    let (part, rest) = std::mem::take(out).split_at_mut(length);
    *out = rest;
    part
}

pub(super) fn input_ids(batch: &Batch<'_>, pad: i64, mut out: &mut [i64]) {
    for group in &batch.groups {
        widen(take(&mut out, group.tokens.len()), group.tokens);
    }
    out.fill(pad);
}

pub(super) fn attention_mask(batch: &Batch<'_>, out: &mut [i64]) {
    let (tokens, filler) = out.split_at_mut(batch.sizes.tokens);
    tokens.fill(1);
    filler.fill(0);
}

pub(super) fn position_ids(batch: &Batch<'_>, mut out: &mut [i64]) {
    for (group, completions) in batch.grouped() {
        count(take(&mut out, group.prompt_length), 0);
        for completion in completions {
            let part = take(&mut out, completion.ids.len());
            count(part, group.prompt_length as i64);
        }
    }
    out.fill(0); // never beyond what the model has positions for
}

pub(super) fn token_mask(batch: &Batch<'_>, mut out: &mut [i64]) {
    for (group, completions) in batch.grouped() {
        take(&mut out, group.prompt_length).fill(0);
        for completion in completions {
            widen_mask(take(&mut out, completion.ids.len()), completion.mask);
        }
    }
    out.fill(0);
}

pub(super) fn segment_ids(batch: &Batch<'_>, mut out: &mut [i64]) {
    for (number, (_, own)) in (1..).zip(batch.sequences()) {
        take(&mut out, own).fill(number);
    }
    out.fill(0);
}

pub(super) fn logit_index(batch: &Batch<'_>, mut out: &mut [i64]) {
    let mut start = 0;
    for (group, completions) in batch.grouped() {
        let prompt_end = start + group.prompt_length as i64 - 1;
        let mut at = prompt_end + 1;
        for completion in completions {
            let part = take(&mut out, completion.ids.len());
            part[0] = prompt_end;
            count(&mut part[1..], at);
            at += completion.ids.len() as i64;
        }
        start = at;
    }
}

pub(super) fn cu_seqlens_q(batch: &Batch<'_>, out: &mut [i32]) {
    let lengths = batch.sequences().into_iter().map(|(_, own)| own);
    add_up(out, lengths.chain([batch.filler()]));
}

pub(super) fn cu_seqlens_k(batch: &Batch<'_>, out: &mut [i32]) {
    let sequences = batch.sequences().into_iter();
    let lengths = sequences.map(|(before, own)| before + own);
    add_up(out, lengths.chain([batch.filler()]));
}

pub(super) fn key_index(batch: &Batch<'_>, mut out: &mut [i64]) {
    let mut start = 0;
    for (group, completions) in batch.grouped() {
        let prompt = group.prompt_length;
        count(take(&mut out, prompt), start);
        let mut at = start + prompt as i64;
        for completion in completions {
            count(take(&mut out, prompt), start);
            count(take(&mut out, completion.ids.len()), at);
            at += completion.ids.len() as i64;
        }
        start = at;
    }
    count(out, start);
}

pub(super) fn max_seqlens(batch: &Batch<'_>, out: &mut [i64]) {
    let filler = batch.filler();
    out[0] = batch.sizes.most_queries.max(filler) as i64;
    out[1] = batch.sizes.longest.max(filler) as i64;
}

/// Of each prompt and each completion: tokens that it sees before its own, and its own.
pub(super) fn sequences(batch: &Batch<'_>) -> impl Iterator<Item = (usize, usize)> {
    batch.grouped().flat_map(|(group, completions)| {
        let prompt = group.prompt_length;
        let of_completions = completions
            .iter()
            .map(move |completion| (prompt, completion.ids.len()));
        std::iter::once((0, prompt)).chain(of_completions)
    })
}

/// 0, the first length, the first two together, …; a last length of 0 finds no slot.
fn add_up(out: &mut [i32], lengths: impl Iterator<Item = usize>) {
    let mut end = 0;
    out[0] = 0;
    for (slot, length) in out[1..].iter_mut().zip(lengths) {
        end += length as i32; // the batch was refused if it had more
        *slot = end;
    }
}
