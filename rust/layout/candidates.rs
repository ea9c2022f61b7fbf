//! The layout of the exported graph: prompts and candidates apart, no store needed.

use crate::{Error, Result};

/// The largest chunk: a graph holds the logits of one chunk at a time.
const MOST: usize = 1 << 16;

/// Padded prompts, padded candidates, and which positions to score.
///
/// `[G]` prompts of up to `P` tokens, `[N]` candidates of up to `C`, `[K]` chunks of positions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidates {
    /// `P`.
    pub prompt_width: usize,
    /// `C`.
    pub candidate_width: usize,
    /// Positions in a chunk.
    pub chunk: usize,
    /// Left-padded ids, 0 in padding: `[G·P]`.
    pub prompt_ids: Vec<i64>,
    /// 1 on tokens: `[G·P]`.
    pub prompt_mask: Vec<i64>,
    /// Right-padded ids, 0 in padding: `[N·C]`.
    pub candidate_ids: Vec<i64>,
    /// 1 on tokens: `[N·C]`.
    pub candidate_mask: Vec<i64>,
    /// Number of the prompt of each candidate: `[N]`.
    pub group: Vec<i64>,
    /// Flat position in `[N·C]` of each token to score, 0 in padding: `[K·chunk]`.
    pub token_index: Vec<i64>,
    /// Candidate of each token to score, `N` in padding: `[K·chunk]`.
    pub token_row: Vec<i64>,
}

impl Candidates {
    /// Lays out `prompts` and the candidates of each.
    pub fn new(prompts: &[&[i32]], candidates: &[Vec<&[i32]>], chunk: usize) -> Result<Self> {
        check(prompts, candidates, chunk)?;
        let flat: Vec<&[i32]> = candidates.concat();
        let tokens: usize = flat.iter().map(|ids| ids.len()).sum();
        let scored = tokens.next_multiple_of(chunk);
        let (prompt_width, candidate_width) = (longest(prompts), longest(&flat));
        let mut layout = Self {
            prompt_width,
            candidate_width,
            chunk,
            prompt_ids: vec![0; prompts.len() * prompt_width],
            prompt_mask: vec![0; prompts.len() * prompt_width],
            candidate_ids: vec![0; flat.len() * candidate_width],
            candidate_mask: vec![0; flat.len() * candidate_width],
            group: Vec::with_capacity(flat.len()),
            token_index: Vec::with_capacity(scored),
            token_row: Vec::with_capacity(scored),
        };
        for (row, ids) in prompts.iter().enumerate() {
            let start = (row + 1) * prompt_width - ids.len();
            fill(&mut layout.prompt_ids, &mut layout.prompt_mask, start, ids);
        }
        for (row, ids) in flat.iter().enumerate() {
            let start = row * candidate_width;
            fill(
                &mut layout.candidate_ids,
                &mut layout.candidate_mask,
                start,
                ids,
            );
            layout
                .token_index
                .extend((start..start + ids.len()).map(|at| at as i64));
            layout
                .token_row
                .extend(std::iter::repeat_n(row as i64, ids.len()));
        }
        for (group, candidates) in candidates.iter().enumerate() {
            layout
                .group
                .extend(std::iter::repeat_n(group as i64, candidates.len()));
        }
        layout.token_index.resize(scored, 0);
        layout.token_row.resize(scored, flat.len() as i64);
        Ok(layout)
    }
}

fn check(prompts: &[&[i32]], candidates: &[Vec<&[i32]>], chunk: usize) -> Result<()> {
    let reason = if !(1..=MOST).contains(&chunk) {
        format!("chunk must be 1 to {MOST}, not {chunk}")
    } else if prompts.is_empty() {
        "there is no prompt".into()
    } else if prompts.len() != candidates.len() {
        format!(
            "{} prompts, but candidates for {}",
            prompts.len(),
            candidates.len()
        )
    } else if let Some(row) = prompts.iter().position(|ids| ids.is_empty()) {
        format!("prompt {row} is empty")
    } else if let Some(row) = candidates.iter().position(Vec::is_empty) {
        format!("prompt {row} has no candidate")
    } else if let Some(row) = candidates.iter().flatten().position(|ids| ids.is_empty()) {
        format!("candidate {row} is empty")
    } else {
        return Ok(());
    };
    Err(Error::Invalid(reason))
}

fn longest(rows: &[&[i32]]) -> usize {
    rows.iter().map(|ids| ids.len()).max().unwrap_or(0)
}

fn fill(ids: &mut [i64], mask: &mut [i64], start: usize, from: &[i32]) {
    let range = start..start + from.len();
    mask[range.clone()].fill(1);
    ids[range]
        .iter_mut()
        .zip(from)
        .for_each(|(slot, &id)| *slot = i64::from(id));
}
