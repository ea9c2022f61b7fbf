//! The tree layout: one row in which groups that share a beginning have it once.
//!
//! Sequences (a prompt with a completion) are walked in lexicographic order, and each adds what no
//! earlier one had: its run. So the row is the tree in depth-first order, and the tokens that a run
//! sees before its own are a part of the sequence before it. A token is predicted at the place of the
//! token before it, wherever that is.

use std::ops::Range;

use super::targets::{count, take, widen};
use crate::{
    prefix_tree::{Sequence, sorted},
    store::StoredGroup,
};

/// The tree of a batch's groups.
#[derive(Debug)]
pub(super) struct Tree<'a> {
    runs: Vec<Run<'a>>,
    /// Place of the token before each target, in flat group-major order.
    logit_index: Vec<i64>,
    /// Places of the tokens that each run sees before its own.
    paths: Vec<i64>,
    tokens: usize,
}

/// What a sequence adds to those before it.
#[derive(Clone, Debug)]
struct Run<'a> {
    sequence: Sequence<'a>,
    /// Tokens that it shares with an earlier sequence.
    known: usize,
    /// Where the places of these are in `paths`.
    path: usize,
}

impl<'a> Tree<'a> {
    pub(super) fn of(groups: &[StoredGroup<'a>]) -> Self {
        let (mut sequences, mut targets, mut end) = (Vec::new(), Vec::new(), 0);
        for (number, &group) in groups.iter().enumerate() {
            for sequence in Sequence::all(group, number) {
                let start = end;
                end += sequence.len() - group.prompt_length;
                sequences.push(sequence);
                targets.push((group.prompt_length, start..end));
            }
        }
        let mut tree = Self {
            runs: Vec::new(),
            logit_index: vec![0; end],
            paths: Vec::new(),
            tokens: 0,
        };
        tree.grow(&sequences, &targets);
        tree
    }

    /// Adds the sequences in order. `targets`: tokens of the prompt of each, and its targets.
    fn grow(&mut self, sequences: &[Sequence<'a>], targets: &[(usize, Range<usize>)]) {
        let (mut places, mut before): (Vec<i64>, Option<Sequence<'_>>) = (Vec::new(), None);
        for number in sorted(sequences) {
            let sequence = sequences[number as usize];
            let known = before.map_or(0, |before| before.shared(sequence));
            let new = sequence.len() - known;
            if known > 0 && known == places.len() {
                // Nothing branches off: this sequence extends the run of the one before.
                self.runs.last_mut().expect("of that sequence").sequence = sequence;
            } else if new > 0 {
                places.truncate(known);
                self.runs.push(Run {
                    sequence,
                    known,
                    path: self.paths.len(),
                });
                self.paths.extend(&places);
            }
            if new > 0 {
                places.extend(self.tokens as i64..(self.tokens + new) as i64);
                self.tokens += new;
            }
            let (prompt, scored) = targets[number as usize].clone();
            let length = scored.len();
            self.logit_index[scored].copy_from_slice(&places[prompt - 1..prompt - 1 + length]);
            before = Some(sequence);
        }
    }

    /// Tokens, each shared one once.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(super) fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Keys that the runs see, added up.
    pub(super) fn keys(&self) -> usize {
        self.paths.len() + self.tokens
    }

    pub(super) fn most_queries(&self) -> usize {
        self.sequences().map(|(_, own)| own).max().unwrap_or(0)
    }

    /// Of each run: tokens that it sees before its own, and its own.
    pub(super) fn sequences(&self) -> impl Iterator<Item = (usize, usize)> {
        let run = |run: &Run<'_>| (run.known, run.sequence.len() - run.known);
        self.runs.iter().map(run)
    }

    pub(super) fn input_ids(&self, pad: i64, mut out: &mut [i64]) {
        for run in &self.runs {
            for ids in run.sequence.rest(run.known) {
                widen(take(&mut out, ids.len()), ids);
            }
        }
        out.fill(pad);
    }

    pub(super) fn position_ids(&self, mut out: &mut [i64]) {
        for (known, own) in self.sequences() {
            count(take(&mut out, own), known as i64);
        }
        out.fill(0);
    }

    pub(super) fn logit_index(&self, out: &mut [i64]) {
        out.copy_from_slice(&self.logit_index);
    }

    pub(super) fn key_index(&self, mut out: &mut [i64]) {
        let mut at = 0;
        for run in &self.runs {
            let own = run.sequence.len() - run.known;
            let path = &self.paths[run.path..run.path + run.known];
            take(&mut out, run.known).copy_from_slice(path);
            count(take(&mut out, own), at);
            at += own as i64;
        }
        count(out, at);
    }
}
