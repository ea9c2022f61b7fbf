//! The padded layout: one row a completion, for models whose state runs through the tokens.

use std::iter::repeat_n;

use super::{
    fields::Side,
    targets::{BatchGroups, count, take, widen, widen_mask},
};
use crate::store::{StoredCompletion, StoredGroup};

/// Rows of prompt and completion, completion-major: completion 0 of every group, then completion 1
/// of every group that has one, ….
pub(super) struct Rows<'a> {
    each: Vec<Row<'a>>,
    /// Row of each completion, group-major.
    row_of: Vec<usize>,
    width: usize,
}

/// One row: `start` elements of padding, prompt, completion, padding.
#[derive(Clone, Copy)]
struct Row<'a> {
    prompt: &'a [i32],
    completion: StoredCompletion<'a>,
    start: usize,
}

/// The four parts of a row.
struct RowParts<'a> {
    before: &'a mut [i64],
    prompt: &'a mut [i64],
    completion: &'a mut [i64],
    after: &'a mut [i64],
}

impl<'a> Rows<'a> {
    pub(super) fn new(groups: &BatchGroups<'a>, width: usize, side: Side) -> Self {
        let row_of = rows_of(&groups.groups);
        let mut number_of = vec![0; row_of.len()];
        for (number, &row) in row_of.iter().enumerate() {
            number_of[row] = number;
        }
        let owners = groups.groups.iter();
        let owners = owners.flat_map(|group| repeat_n(group.prompt(), group.roles().len()));
        let prompts: Vec<&[i32]> = owners.collect();
        let row = |number: usize| {
            let (prompt, completion) = (prompts[number], groups.completions[number]);
            let length = prompt.len() + completion.ids.len();
            Row {
                prompt,
                completion,
                start: match side {
                    Side::Left => width - length,
                    Side::Right => 0,
                },
            }
        };
        Self {
            each: number_of.into_iter().map(row).collect(),
            row_of,
            width,
        }
    }

    pub(super) fn input_ids(&self, pad: i64, out: &mut [i64]) {
        self.fill(out, |row, parts| {
            parts.before.fill(pad);
            widen(parts.prompt, row.prompt);
            widen(parts.completion, row.completion.ids);
            parts.after.fill(pad);
        });
    }

    pub(super) fn attention_mask(&self, out: &mut [i64]) {
        self.fill(out, |_, parts| {
            parts.before.fill(0);
            parts.prompt.fill(1);
            parts.completion.fill(1);
            parts.after.fill(0);
        });
    }

    pub(super) fn position_ids(&self, out: &mut [i64]) {
        self.fill(out, |row, parts| {
            parts.before.fill(0);
            count(parts.prompt, 0);
            count(parts.completion, row.prompt.len() as i64);
            parts.after.fill(0);
        });
    }

    pub(super) fn token_mask(&self, out: &mut [i64]) {
        self.fill(out, |row, parts| {
            parts.before.fill(0);
            parts.prompt.fill(0);
            widen_mask(parts.completion, row.completion.mask);
            parts.after.fill(0);
        });
    }

    pub(super) fn segment_ids(&self, out: &mut [i64]) {
        self.fill(out, |_, parts| {
            parts.before.fill(0);
            parts.prompt.fill(1);
            parts.completion.fill(2);
            parts.after.fill(0);
        });
    }

    pub(super) fn logit_index(&self, mut out: &mut [i64]) {
        for &number in &self.row_of {
            let row = &self.each[number];
            let part = take(&mut out, row.completion.ids.len());
            let prompt_end = number * self.width + row.start + row.prompt.len() - 1;
            count(part, prompt_end as i64);
        }
    }

    fn fill(&self, out: &mut [i64], fill: impl Fn(&Row<'_>, RowParts<'_>)) {
        for (row, cells) in self
            .each
            .iter()
            .zip(out.chunks_exact_mut(self.width.max(1)))
        {
            let (before, rest) = cells.split_at_mut(row.start);
            let (prompt, rest) = rest.split_at_mut(row.prompt.len());
            let (completion, after) = rest.split_at_mut(row.completion.ids.len());
            let parts = RowParts {
                before,
                prompt,
                completion,
                after,
            };
            fill(row, parts);
        }
    }
}

/// The row of each completion, group-major.
fn rows_of(groups: &[StoredGroup<'_>]) -> Vec<usize> {
    let mut next = first_rows(groups);
    let mut rows = Vec::new();
    for group in groups {
        for row in &mut next[..group.roles().len()] {
            rows.push(*row);
            *row += 1;
        }
    }
    rows
}

/// The row of the first completion 0, of the first completion 1, ….
fn first_rows(groups: &[StoredGroup<'_>]) -> Vec<usize> {
    let sizes = || groups.iter().map(|group| group.roles().len());
    let most = sizes().max().unwrap_or(0);
    let mut counts = vec![0; most + 1];
    for size in sizes() {
        for count in &mut counts[1..=size] {
            *count += 1;
        }
    }
    for number in 1..=most {
        counts[number] += counts[number - 1];
    }
    counts
}
