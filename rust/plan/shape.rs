//! What a group takes up, and what it costs.

use super::Layout;

/// Parts of a token in which work is counted: whole numbers add up alike on every machine.
const PARTS: f64 = 1024.0;

/// What a group, or a micro-batch of groups, takes up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Tokens, each prompt once.
    pub tokens: u32,
    /// Completions.
    pub rows: u32,
    /// Tokens of the longest prompt with one of its completions.
    pub longest: u32,
    /// Token pairs that attend, each prompt once: every token to itself and to what it sees.
    pub pairs: u64,
}

impl Shape {
    /// The shape of a group with a prompt of `prompt` tokens and completions of these lengths.
    pub fn new(prompt: usize, completions: impl Iterator<Item = u32>) -> Self {
        let (prompt, mut shape) = (prompt as u32, Self::default());
        shape.add(0, prompt);
        for length in completions {
            shape.rows += 1;
            shape.add(prompt, length);
        }
        shape
    }

    /// Adds `own` tokens that see `before` tokens and themselves. A damaged store may hold numbers
    /// that no group has: they saturate.
    fn add(&mut self, before: u32, own: u32) {
        self.tokens = self.tokens.saturating_add(own);
        self.longest = self.longest.max(before.saturating_add(own));
        let (before, own) = (u64::from(before), u64::from(own));
        let pairs = (before * own).saturating_add(own * (own + 1) / 2);
        self.pairs = self.pairs.saturating_add(pairs);
    }

    /// What of the token budget a group takes up alone.
    pub(super) fn size(self, layout: Layout) -> u64 {
        match layout {
            Layout::Shared | Layout::Tree => u64::from(self.tokens),
            Layout::Padded => u64::from(self.rows) * u64::from(self.longest),
        }
    }

    /// What groups of similar length have in common.
    pub(super) fn length(self, layout: Layout) -> u32 {
        match layout {
            Layout::Shared | Layout::Tree => self.tokens,
            Layout::Padded => self.longest,
        }
    }

    /// Estimated work, in 1/1024 of a token's: a token costs 1 and a pair that attends
    /// `attention_cost`.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "an estimate, of nothing below zero"
    )]
    pub(super) fn work(self, layout: Layout, attention_cost: f64) -> u64 {
        let longest = u64::from(self.longest);
        let pairs = match layout {
            Layout::Shared | Layout::Tree => self.pairs,
            Layout::Padded => u64::from(self.rows) * (longest * (longest + 1) / 2),
        };
        (PARTS * (self.size(layout) as f64 + attention_cost * pairs as f64)) as u64
    }
}
