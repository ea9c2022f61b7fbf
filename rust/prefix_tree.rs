//! Groups that share a beginning, as one tree of tokens: a shared token is there once.
//!
//! A sequence is a prompt with one of its completions. Sequences that begin with the same tokens
//! (one system prompt; a conversation whose next prompt is the earlier prompt and its answer; two
//! answers with the same first words) share these tokens, and a token's hidden state depends on
//! nothing but the tokens before it. So a batch computes each distinct beginning once:
//!
//! ```text
//! tokens = Σ length(i) − Σ common(i, i − 1)        over the sequences in lexicographic order
//! pairs  = Σ new(i) · length(i) − new(i)² / 2       that attend: only new tokens are queries
//! ```
//!
//! With `new(i) = length(i) − common(i, i − 1)`. Both are at most what the groups take apart. A
//! shared token spares a token's products (24 · hidden² operations a layer, three times that in
//! training) and costs each sequence that sees it a copy of its key and value, some hundreds of times
//! less: sharing pays from a few tokens on.
//!
//! Groups share where their prompts agree in their first [`LEAST`] tokens; below that (a token that
//! begins every text) attention would lose its plain causal form for nothing. The sequences of one
//! group always share what they have in common.

use std::cmp::Ordering;

use crate::{
    Error, Result, parallel,
    store::{Store, StoredGroup},
};

/// Tokens at the beginning in which prompts must agree for their groups to share.
pub const LEAST: usize = 8;

/// Threads that count.
const THREADS: usize = 8;

/// A prompt with one completion, in the order of the tree.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    prompt: &'a [i32],
    completion: &'a [i32],
    /// The group, where its prompt is too short to be shared with another's.
    alone: Option<usize>,
}

impl<'a> Sequence<'a> {
    fn new(group: StoredGroup<'a>, number: usize, completion: &'a [i32]) -> Self {
        let prompt = group.prompt();
        Self {
            prompt,
            completion,
            alone: (prompt.len() < LEAST).then_some(number),
        }
    }

    /// The prompt of a group, whose place in its list is `number`.
    pub fn prompt(group: StoredGroup<'a>, number: usize) -> Self {
        Self::new(group, number, &[])
    }

    /// Every sequence of a group, whose place in its list is `number`.
    pub fn all(group: StoredGroup<'a>, number: usize) -> impl Iterator<Item = Self> {
        let completions = group.completions();
        completions.map(move |completion| Self::new(group, number, completion.ids))
    }

    /// Tokens of prompt and completion.
    pub fn len(self) -> usize {
        self.prompt.len() + self.completion.len()
    }

    /// Whether there is no token.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The tokens from `start` on: the rest of the prompt, and of the completion.
    pub fn rest(self, start: usize) -> [&'a [i32]; 2] {
        let prompt = self.prompt.len();
        let completion = start.saturating_sub(prompt).min(self.completion.len());
        [
            &self.prompt[start.min(prompt)..],
            &self.completion[completion..],
        ]
    }

    /// Length of the common prefix; the first `known` tokens are known to be equal.
    fn common(self, other: Self, known: usize) -> usize {
        let mut at = known;
        loop {
            let (own, others) = (self.part_from(at), other.part_from(at));
            let length = own.len().min(others.len());
            let same = equal(&own[..length], &others[..length]);
            at += same;
            if same < length || length == 0 {
                return at;
            }
        }
    }

    /// The tokens from `at` to the end of the prompt, or to the end of the completion.
    fn part_from(self, at: usize) -> &'a [i32] {
        let [prompt, completion] = self.rest(at);
        if prompt.is_empty() {
            completion
        } else {
            prompt
        }
    }

    /// Lexicographic order of token ids, a prefix before its continuations.
    fn order(self, other: Self, known: usize) -> Ordering {
        self.alone.cmp(&other.alone).then_with(|| {
            let at = self.common(other, known);
            self.part_from(at).first().cmp(&other.part_from(at).first())
        })
    }

    /// Tokens that are computed once for both.
    pub fn shared(self, other: Self) -> usize {
        if self.alone != other.alone {
            return 0;
        }
        let common = self.common(other, 0);
        if common < LEAST && self.alone.is_none() {
            return 0;
        }
        common
    }
}

/// How many tokens agree, from the first on.
fn equal(one: &[i32], other: &[i32]) -> usize {
    const BLOCK: usize = 16; // compared at once
    let blocks = one.chunks_exact(BLOCK).zip(other.chunks_exact(BLOCK));
    let start = BLOCK * blocks.take_while(|(one, other)| one == other).count();
    let rest = one[start..].iter().zip(&other[start..]);
    start + rest.take_while(|(one, other)| one == other).count()
}

/// The order of the tree: the numbers of the sequences, equal ones as they come.
pub fn sorted(sequences: &[Sequence<'_>]) -> Vec<u32> {
    let Some(&first) = sequences.first() else {
        return Vec::new();
    };
    // A system prompt that all share is compared once, not at each comparison.
    let shared = sequences
        .iter()
        .map(|&other| match (first.alone, other.alone) {
            (None, None) => first.common(other, 0),
            _ => 0,
        });
    let known = shared.min().unwrap_or(0);
    let mut order: Vec<u32> = (0..sequences.len() as u32).collect();
    order.sort_unstable_by(|&one, &other| {
        let (first, second) = (sequences[one as usize], sequences[other as usize]);
        first.order(second, known).then(one.cmp(&other))
    });
    order
}

/// Tokens of the tree of sequences.
fn tokens(sequences: &[Sequence<'_>]) -> u64 {
    let order = sorted(sequences);
    let at = |number: u32| sequences[number as usize];
    let shared = order.windows(2).map(|pair| at(pair[0]).shared(at(pair[1])));
    let all: u64 = sequences.iter().map(|one| one.len() as u64).sum();
    all - shared.map(|tokens| tokens as u64).sum::<u64>()
}

/// Tokens of the tree that each of some lists of groups makes.
///
/// `groups` are the lists end to end; `offsets` where each begins, and their end: `[B+1]`, rising.
pub fn count(store: &Store, groups: &[i64], offsets: &[i64]) -> Result<Vec<u64>> {
    let lists: Vec<&[i64]> = offsets.windows(2).collect();
    let share = lists.len().div_ceil(parallel::threads(THREADS)).max(1);
    let parts = parallel::each(lists.chunks(share).collect(), |lists: &[&[i64]]| {
        let counts = lists.iter().map(|pair| {
            let list = groups.get(index(pair[0])..index(pair[1]));
            let reason = || Error::Invalid(format!("the offsets {pair:?} are impossible"));
            Ok(tokens(&sequences(store, list.ok_or_else(reason)?)?))
        });
        counts.collect::<Result<Vec<u64>>>()
    });
    Ok(parts.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

/// An offset as an index; one below 0 is beyond every list.
fn index(offset: i64) -> usize {
    offset.cast_unsigned() as usize
}

/// Every sequence of some groups.
fn sequences<'a>(store: &'a Store, groups: &[i64]) -> Result<Vec<Sequence<'a>>> {
    let mut sequences = Vec::new();
    for (number, &group) in groups.iter().enumerate() {
        sequences.extend(Sequence::all(store.group(group)?, number));
    }
    Ok(sequences)
}

/// Groups in the order of their prompts in the tree: those that share a beginning are neighbours.
///
/// What has the same prompt, or shares with none, keeps its order.
pub fn order(store: &Store, groups: &[i64]) -> Result<Vec<i64>> {
    let prompt = |(number, &group)| Ok(Sequence::prompt(store.group(group)?, number));
    let prompts: Vec<_> = groups
        .iter()
        .enumerate()
        .map(prompt)
        .collect::<Result<_>>()?;
    let order = sorted(&prompts).into_iter();
    Ok(order.map(|number| groups[number as usize]).collect())
}

/// A tree that grows group by group.
#[derive(Debug, Default)]
pub struct Tree<'a> {
    sorted: Vec<Sequence<'a>>,
    groups: usize,
    /// Tokens, each shared one once.
    pub tokens: u64,
}

impl<'a> Tree<'a> {
    /// Adds the sequences of a group.
    pub fn add(&mut self, group: StoredGroup<'a>) {
        for sequence in Sequence::all(group, self.groups) {
            let place = self.sorted.binary_search_by(|one| one.order(sequence, 0));
            let Err(at) = place else { continue };
            let before = at.checked_sub(1).map(|before| self.sorted[before]);
            let neighbours = before.into_iter().chain(self.sorted.get(at).copied());
            let known = neighbours.map(|one| one.shared(sequence)).max();
            self.tokens += (sequence.len() - known.unwrap_or(0)) as u64;
            self.sorted.insert(at, sequence);
        }
        self.groups += 1;
    }
}

/// How many of the first `groups` make a tree of at most `budget` tokens: at least one, if any.
pub fn fit(store: &Store, groups: &[i64], budget: u64) -> Result<usize> {
    let mut tree = Tree::default();
    for (taken, &group) in groups.iter().enumerate() {
        tree.add(store.group(group)?);
        if tree.tokens > budget && taken > 0 {
            return Ok(taken);
        }
    }
    Ok(groups.len())
}

/// Cuts all groups, in the order of the tree, into micro-batches: where each begins, and their end.
pub fn cut(store: &Store, groups: &[i64], budget: u64) -> Result<Vec<i64>> {
    let (mut offsets, mut end) = (vec![0], 0);
    while end < groups.len() {
        end += fit(store, &groups[end..], budget)?;
        offsets.push(end as i64);
    }
    Ok(offsets)
}

/// Neighbours in the order of the tree that share a beginning and fit in `budget` together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// How many groups.
    pub groups: u32,
    /// Tokens of their tree.
    pub tokens: u64,
}

/// Cuts groups, in the order of the tree, into bundles.
pub fn bundles(store: &Store, groups: &[i64], budget: u64) -> Result<Vec<Bundle>> {
    let mut bundles: Vec<Bundle> = Vec::new();
    let (mut tree, mut before) = (Tree::default(), None);
    for (number, &group) in groups.iter().enumerate() {
        let group = store.group(group)?;
        let prompt = Sequence::prompt(group, number);
        let is_near = before.is_some_and(|before| prompt.shared(before) > 0);
        tree.add(group);
        match bundles.last_mut() {
            Some(bundle) if is_near && tree.tokens <= budget => {
                bundle.groups += 1;
                bundle.tokens = tree.tokens;
            }
            _ => {
                tree = Tree::default();
                tree.add(group);
                bundles.push(Bundle {
                    groups: 1,
                    tokens: tree.tokens,
                });
            }
        }
        before = Some(prompt);
    }
    Ok(bundles)
}
