//! One update: a rank's share of it, and the micro-batches of the share.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    iter::repeat_n,
};

use super::request::Request;
use crate::{
    Result,
    group::{Layout, Shape},
    prefix_tree,
};

/// Room of open micro-batches, and their numbers; the least room that is enough comes first.
type Rooms = BTreeSet<(u64, u32)>;

/// Cuts updates into micro-batches; keeps its memory from one update to the next.
pub(super) struct Packer<'a> {
    shapes: &'a [Shape],
    request: &'a Request<'a>,
    share: Vec<u32>,
    keys: Vec<u64>,
    /// Groups, or bundles of them, that stay together, and their tokens: the largest first.
    items: Vec<(u32, u64)>,
    bins: Vec<u32>,
    rooms: Rooms,
    /// Groups in each micro-batch.
    pub sizes: Vec<u32>,
    /// Micro-batches in each update.
    pub counts: Vec<u32>,
}

impl<'a> Packer<'a> {
    pub(super) fn new(shapes: &'a [Shape], request: &'a Request<'a>) -> Self {
        Self {
            shapes,
            request,
            share: Vec::new(),
            keys: Vec::new(),
            items: Vec::new(),
            bins: Vec::new(),
            rooms: Rooms::new(),
            sizes: Vec::new(),
            counts: Vec::new(),
        }
    }

    /// Puts the rank's share to the front of `update`, micro-batch by micro-batch.
    pub(super) fn pack(&mut self, update: &mut [u32]) -> Result<()> {
        self.take_share(update);
        self.sort_share();
        let first = self.sizes.len();
        match self.request.layout {
            Layout::Shared => {
                self.take_single();
                self.best_fit(first);
            }
            Layout::Tree => {
                self.take_bundles()?;
                self.best_fit(first);
            }
            Layout::Padded => self.next_fit(first),
        }
        self.counts.push((self.sizes.len() - first) as u32);
        let mut next: Vec<usize> = self.sizes[first..]
            .iter()
            .scan(0, |end, &size| {
                let start = *end;
                *end += size as usize;
                Some(start)
            })
            .collect();
        for (&group, &bin) in self.share.iter().zip(&self.bins) {
            update[next[bin as usize]] = group;
            next[bin as usize] += 1;
        }
        Ok(())
    }

    /// The dearest group first, each to the rank that has least to do.
    fn take_share(&mut self, update: &[u32]) {
        self.share.clear();
        if self.request.world_size == 1 {
            self.share.extend_from_slice(update);
            return;
        }
        let Request {
            layout,
            attention_cost,
            ..
        } = *self.request;
        let mut dearest: Vec<(Reverse<u64>, u32)> = update
            .iter()
            .map(|&group| self.shapes[group as usize].work(layout, attention_cost))
            .zip(0..)
            .map(|(work, at)| (Reverse(work), at))
            .collect();
        dearest.sort_unstable();
        let ranks = 0..self.request.world_size.min(update.len());
        let mut loads: BinaryHeap<_> = ranks.map(|rank| Reverse((0, 0, rank))).collect();
        for (Reverse(work), at) in dearest {
            let Reverse((load, count, rank)) = loads.pop().expect("as many as groups");
            loads.push(Reverse((load + work, count + 1, rank)));
            if rank == self.request.rank {
                self.share.push(update[at as usize]);
            }
        }
    }

    /// Longest first; what is equally long keeps its order.
    fn sort_share(&mut self) {
        let length =
            |&group: &u32| u64::from(!self.shapes[group as usize].length(self.request.layout));
        self.keys.clear();
        let keys = self.share.iter().zip(0u64..);
        self.keys
            .extend(keys.map(|(group, at)| length(group) << 32 | at));
        self.keys.sort_unstable();
        let sorted = self
            .keys
            .iter()
            .map(|&key| self.share[key as u32 as usize])
            .collect();
        self.share = sorted;
    }

    /// Every group by itself.
    fn take_single(&mut self) {
        let size = |&group: &u32| self.shapes[group as usize].size(Layout::Shared);
        self.items.clear();
        self.items
            .extend(self.share.iter().map(|group| (1, size(group))));
    }

    /// Groups that share a beginning one after another, in bundles that fit in a micro-batch.
    fn take_bundles(&mut self) -> Result<()> {
        let store = self.request.store.expect("checked with the request");
        let share: Vec<i64> = self.share.iter().map(|&group| i64::from(group)).collect();
        let share = prefix_tree::order(store, &share)?;
        let mut bundles = Vec::new();
        let mut rest = &share[..];
        for bundle in prefix_tree::bundles(store, &share, self.request.token_budget as u64)? {
            let groups;
            (groups, rest) = rest.split_at(bundle.groups as usize);
            bundles.push((Reverse(bundle.tokens), groups));
        }
        bundles.sort_by_key(|&(tokens, _)| tokens);
        self.share.clear();
        self.items.clear();
        for (Reverse(tokens), groups) in bundles {
            self.share
                .extend(groups.iter().map(|group| group.cast_unsigned() as u32));
            self.items.push((groups.len() as u32, tokens));
        }
        Ok(())
    }

    /// Each item into the fullest micro-batch that still holds it.
    fn best_fit(&mut self, first: usize) {
        self.bins.clear();
        self.rooms.clear();
        let least = self.items.last().map_or(0, |&(_, need)| need);
        for &(groups, need) in &self.items {
            let fullest = self.rooms.range((need, 0)..).next().copied();
            let (room, bin) = fullest.unwrap_or_else(|| {
                self.sizes.push(0);
                let budget = self.request.token_budget as u64;
                (budget.max(need), (self.sizes.len() - first - 1) as u32)
            });
            self.rooms.remove(&(room, bin));
            if room - need >= least {
                self.rooms.insert((room - need, bin));
            }
            self.sizes[first + bin as usize] += groups;
            self.bins.extend(repeat_n(bin, groups as usize));
        }
    }

    /// Cut wherever the budget is full: a short row in an earlier micro-batch would pay for the
    /// longest there.
    fn next_fit(&mut self, first: usize) {
        self.bins.clear();
        let (mut rows, mut longest) = (0, 0);
        for &group in &self.share {
            let shape = self.shapes[group as usize];
            rows += u64::from(shape.rows);
            if self.sizes.len() == first || rows * longest > self.request.token_budget as u64 {
                self.sizes.push(0);
                (rows, longest) = (u64::from(shape.rows), u64::from(shape.longest));
            }
            self.bins.push((self.sizes.len() - first - 1) as u32);
            *self.sizes.last_mut().expect("pushed above") += 1;
        }
    }
}
