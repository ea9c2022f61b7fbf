//! Which groups share an update and a micro-batch, in which order, on which rank.

mod mixture;
mod order;
mod packing;
mod random;
mod shape;
mod threads;

use std::str::FromStr;

pub use mixture::{Mixture, dataset_of};
use packing::Packer;
pub use shape::Shape;

use crate::{Error, Result, store::Store};

/// The order in which an epoch visits the groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Random updates of similar lengths.
    LengthGrouped,
    /// Random groups.
    Shuffled,
    /// Longest first, so that what does not fit in memory fails at once. Nothing is random.
    Sorted,
}

/// What a micro-batch pays for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Every token once, prompts once a group.
    Shared,
    /// Every beginning that groups share once: see [`crate::tree`].
    Tree,
    /// Rows times the longest row.
    Padded,
}

/// What to plan.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The order of the groups.
    pub order: Order,
    /// What is random depends on this number and the epoch only.
    pub seed: u64,
    /// Number of the pass over the data.
    pub epoch: u64,
    /// Groups of one update, over all ranks.
    pub groups_per_update: usize,
    /// The most tokens a micro-batch may hold; a larger group has one for itself.
    pub token_budget: usize,
    /// What a micro-batch holds.
    pub layout: Layout,
    /// Which share of every update to return.
    pub rank: usize,
    /// How many shares there are.
    pub world_size: usize,
    /// Datasets mixed by weight; every group once without it.
    pub mixture: Option<Mixture<'a>>,
    /// Work of a token pair that attends, where the rest of a token's work is 1: shares of ranks are
    /// balanced by tokens + `attention_cost` × pairs. With hidden size `h`, a layer's weights cost
    /// about 24·h² operations a token and attention 4·h a pair: 1/(6·h).
    pub attention_cost: f64,
    /// Where the tokens of the groups are: [`Layout::Tree`] compares them.
    pub store: Option<&'a Store>,
}

impl Request<'_> {
    /// One rank, every group once, shares by tokens.
    pub fn new(order: Order, groups_per_update: usize, token_budget: usize) -> Self {
        Self {
            order,
            seed: 0,
            epoch: 0,
            groups_per_update,
            token_budget,
            layout: Layout::Shared,
            rank: 0,
            world_size: 1,
            mixture: None,
            attention_cost: 0.0,
            store: None,
        }
    }

    fn check(&self, groups: usize) -> Result<()> {
        let Self {
            groups_per_update,
            token_budget,
            rank,
            world_size,
            attention_cost,
            ..
        } = *self;
        let reason = if groups_per_update == 0 || token_budget == 0 || rank >= world_size {
            format!(
                "groups_per_update ({groups_per_update}) and token_budget ({token_budget}) must be \
                 at least 1, and rank ({rank}) below world_size ({world_size})"
            )
        } else if !attention_cost.is_finite() || attention_cost < 0.0 {
            format!("attention_cost must be at least 0, not {attention_cost}")
        } else if self.layout == Layout::Tree
            && self.store.is_none_or(|store| store.len() != groups)
        {
            "the tree layout needs the store of the groups".into()
        } else if u32::try_from(groups).is_err() {
            format!("{groups} groups are more than a plan can number (2^32-1)")
        } else {
            return self.mixture.map_or(Ok(()), |mixture| mixture.check(groups));
        };
        Err(Error::Invalid(reason))
    }
}

/// One rank's share of an epoch.
///
/// Updates are made of micro-batches, micro-batches of groups. A rank gets no micro-batch of an
/// update that has fewer groups than there are ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Numbers of the groups.
    pub order: Vec<i64>,
    /// Where each micro-batch begins in `order`, and its length: `[M+1]`.
    pub micro_offsets: Vec<i64>,
    /// Where each update begins in the micro-batches, and their number: `[U+1]`.
    pub update_offsets: Vec<i64>,
}

/// Plans one epoch over groups of these `shapes`.
///
/// Over all ranks every group comes exactly once (a mixture: as often as its dataset draws it), in
/// the same updates whatever the number of ranks: a position is an epoch and an update.
///
/// Takes about 24 bytes a group beside `shapes`, and the plan's own arrays.
/// ```
/// use logratio::plan::{Order, Request, Shape, plan};
///
/// let shapes = [5, 9, 7].map(|prompt| Shape::new(prompt, [1, 2].into_iter()));
/// let plan = plan(&shapes, &Request::new(Order::Sorted, 2, 24))?;
/// assert_eq!(plan.order, [1, 2, 0]); // 12 + 10 tokens fit in 24; 8 is the next update
/// assert_eq!(plan.micro_offsets, [0, 2, 3]);
/// assert_eq!(plan.update_offsets, [0, 1, 2]);
/// # Ok::<(), logratio::Error>(())
/// ```
pub fn plan(shapes: &[Shape], request: &Request<'_>) -> Result<Plan> {
    request.check(shapes.len())?;
    let mut order = order::epoch(shapes, request);
    let size = request.groups_per_update.min(order.len().max(1));
    let parts = threads::map(&mut order, size, |part| {
        let mut packer = Packer::new(shapes, request);
        let mut updates = part.chunks_mut(size);
        updates.try_for_each(|update| packer.pack(update))?;
        Ok((packer.sizes, packer.counts))
    });
    let mut plan = Plan {
        order: Vec::with_capacity(order.len().div_ceil(request.world_size)),
        micro_offsets: vec![0],
        update_offsets: vec![0],
    };
    let mut updates = order.chunks(size);
    for part in parts {
        let (sizes, counts): (Vec<u32>, Vec<u32>) = part?;
        let mut sizes = sizes.into_iter();
        for (count, update) in counts.into_iter().zip(&mut updates) {
            plan.push(update, sizes.by_ref().take(count as usize));
        }
    }
    Ok(plan)
}

impl Plan {
    /// Adds an update whose groups come first in `update`, in micro-batches of these `sizes`.
    fn push(&mut self, update: &[u32], sizes: impl Iterator<Item = u32>) {
        let mut end = 0;
        for size in sizes {
            end += size as usize;
            self.micro_offsets.push((self.order.len() + end) as i64);
        }
        self.order
            .extend(update[..end].iter().map(|&group| i64::from(group)));
        self.update_offsets
            .push(self.micro_offsets.len() as i64 - 1);
    }
}

impl FromStr for Order {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "length_grouped" => Ok(Self::LengthGrouped),
            "shuffled" => Ok(Self::Shuffled),
            "sorted" => Ok(Self::Sorted),
            _ => Err(Error::Invalid(format!(
                "order must be length_grouped, shuffled or sorted, not {name:?}"
            ))),
        }
    }
}

impl FromStr for Layout {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "shared" => Ok(Self::Shared),
            "tree" => Ok(Self::Tree),
            "padded" => Ok(Self::Padded),
            _ => Err(Error::Invalid(format!(
                "layout must be shared, tree or padded, not {name:?}"
            ))),
        }
    }
}
