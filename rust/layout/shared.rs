//! The shared-prompt layout: one row of prompt, completion 1, …, completion K, next group, ….
//!
//! The first token of every completion is predicted by the last position of its prompt. A row shorter
//! than a fixed width is filled up: no target is there, and these tokens attend only to one another.
//! The functions that take `sequences` serve the tree layout too.

use super::targets::{BatchGroups, Sizes, count, take, widen, widen_mask};

pub(super) fn input_ids(groups: &BatchGroups<'_>, pad: i64, mut out: &mut [i64]) {
    for group in &groups.groups {
        widen(take(&mut out, group.tokens.len()), group.tokens);
    }
    out.fill(pad);
}

pub(super) fn attention_mask(groups: &BatchGroups<'_>, out: &mut [i64]) {
    let (tokens, filler) = out.split_at_mut(groups.sizes.tokens);
    tokens.fill(1);
    filler.fill(0);
}

pub(super) fn position_ids(groups: &BatchGroups<'_>, mut out: &mut [i64]) {
    for (group, completions) in groups.grouped() {
        count(take(&mut out, group.prompt_length), 0);
        for completion in completions {
            let part = take(&mut out, completion.ids.len());
            count(part, group.prompt_length as i64);
        }
    }
    out.fill(0); // never beyond what the model has positions for
}

pub(super) fn token_mask(groups: &BatchGroups<'_>, mut out: &mut [i64]) {
    for (group, completions) in groups.grouped() {
        take(&mut out, group.prompt_length).fill(0);
        for completion in completions {
            widen_mask(take(&mut out, completion.ids.len()), completion.mask);
        }
    }
    out.fill(0);
}

pub(super) fn segment_ids(sequences: &[(usize, usize)], mut out: &mut [i64]) {
    for (number, &(_, own)) in (1..).zip(sequences) {
        take(&mut out, own).fill(number);
    }
    out.fill(0);
}

pub(super) fn logit_index(groups: &BatchGroups<'_>, mut out: &mut [i64]) {
    let mut start = 0;
    for (group, completions) in groups.grouped() {
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

pub(super) fn cu_seqlens_q(sequences: &[(usize, usize)], filler: usize, out: &mut [i32]) {
    let lengths = sequences.iter().map(|&(_, own)| own);
    add_up(out, lengths.chain([filler]));
}

pub(super) fn cu_seqlens_k(sequences: &[(usize, usize)], filler: usize, out: &mut [i32]) {
    let lengths = sequences.iter().map(|&(before, own)| before + own);
    add_up(out, lengths.chain([filler]));
}

pub(super) fn key_index(groups: &BatchGroups<'_>, mut out: &mut [i64]) {
    let mut start = 0;
    for (group, completions) in groups.grouped() {
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

pub(super) fn max_seqlens(sizes: Sizes, filler: usize, out: &mut [i64]) {
    out[0] = sizes.most_queries.max(filler) as i64;
    out[1] = sizes.longest.max(filler) as i64;
}

/// Of each prompt and each completion: tokens that it sees before its own, and its own.
pub(super) fn sequences(groups: &BatchGroups<'_>) -> impl Iterator<Item = (usize, usize)> {
    groups.grouped().flat_map(|(group, completions)| {
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
