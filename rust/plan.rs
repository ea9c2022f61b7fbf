//! Which groups share an update and a micro-batch, in which order, on which rank.

use std::{cmp::Reverse, str::FromStr};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use crate::{Error, Result};

/// Updates whose groups are sorted by length together: enough that an update holds similar
/// lengths, few enough that the order of an epoch stays random.
const WINDOW: usize = 64;

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
    /// Every token once.
    Shared,
    /// Rows times the longest row.
    Padded,
}

/// What a group, or a micro-batch of groups, takes up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Tokens, each prompt once.
    pub tokens: usize,
    /// Completions.
    pub rows: usize,
    /// Tokens of the longest prompt with one of its completions.
    pub longest: usize,
}

/// What to plan.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The order of the groups.
    pub order: Order,
    /// What is random depends on this number and the epoch only.
    pub seed: u64,
    /// Number of the pass over the data.
    pub epoch: u64,
    /// Groups of one update, over all ranks.
    pub groups_per_update: usize,
    /// The most a micro-batch may cost; a single group above it stands alone.
    pub token_budget: usize,
    /// What a micro-batch costs.
    pub layout: Layout,
    /// Which share of every update to return.
    pub rank: usize,
    /// How many shares there are.
    pub world_size: usize,
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

impl Shape {
    fn cost(self, layout: Layout) -> usize {
        match layout {
            Layout::Shared => self.tokens,
            Layout::Padded => self.rows * self.longest,
        }
    }

    /// What groups of similar length have in common.
    fn length(self, layout: Layout) -> usize {
        match layout {
            Layout::Shared => self.tokens,
            Layout::Padded => self.longest,
        }
    }

    fn with(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            rows: self.rows + other.rows,
            longest: self.longest.max(other.longest),
        }
    }
}

/// Plans one epoch over groups of these `shapes`.
///
/// Over all ranks every group comes exactly once, in the same updates whatever the number of ranks.
/// ```
/// use logratio::plan::{Layout, Order, Request, Shape, plan};
///
/// let shapes = [5, 9, 7].map(|tokens| Shape { tokens, rows: 2, longest: tokens });
/// let plan = plan(&shapes, &Request {
///     order: Order::Sorted,
///     seed: 0,
///     epoch: 0,
///     groups_per_update: 2,
///     token_budget: 16,
///     layout: Layout::Shared,
///     rank: 0,
///     world_size: 1,
/// })?;
/// assert_eq!(plan.order, [1, 2, 0]); // 9 + 7 tokens fit in 16; 5 is the next update
/// assert_eq!(plan.micro_offsets, [0, 2, 3]);
/// assert_eq!(plan.update_offsets, [0, 1, 2]);
/// # Ok::<(), logratio::Error>(())
/// ```
pub fn plan(shapes: &[Shape], request: &Request) -> Result<Plan> {
    request.check()?;
    let order = order(shapes, request);
    let mut plan = Plan {
        order: Vec::with_capacity(shapes.len() / request.world_size),
        micro_offsets: vec![0],
        update_offsets: vec![0],
    };
    for update in order.chunks(request.groups_per_update) {
        plan.push(shapes, request, share(shapes, request, update));
    }
    Ok(plan)
}

impl Request {
    fn check(&self) -> Result<()> {
        let Self {
            groups_per_update,
            token_budget,
            rank,
            world_size,
            ..
        } = *self;
        if groups_per_update == 0 || token_budget == 0 || rank >= world_size {
            return Err(Error::Invalid(format!(
                "groups_per_update ({groups_per_update}) and token_budget ({token_budget}) must be \
                 at least 1, and rank ({rank}) below world_size ({world_size})"
            )));
        }
        Ok(())
    }
}

impl Plan {
    /// Adds an update: its groups longest first, cut wherever the budget is full.
    fn push(&mut self, shapes: &[Shape], request: &Request, mut groups: Vec<usize>) {
        let Request {
            layout,
            token_budget,
            ..
        } = *request;
        groups.sort_by_key(|&group| Reverse(shapes[group].length(layout)));
        let mut micro = Shape::default();
        for group in groups {
            let grown = micro.with(shapes[group]);
            let fits = grown.cost(layout) <= token_budget;
            if !fits && micro.rows > 0 {
                self.micro_offsets.push(self.order.len() as i64);
            }
            micro = if fits || micro.rows == 0 {
                grown
            } else {
                shapes[group]
            };
            self.order.push(group as i64);
        }
        if micro.rows > 0 {
            self.micro_offsets.push(self.order.len() as i64);
        }
        self.update_offsets
            .push(self.micro_offsets.len() as i64 - 1);
    }
}

/// One rank's groups of an update: the dearest first, each to the rank that has least to do.
fn share(shapes: &[Shape], request: &Request, update: &[usize]) -> Vec<usize> {
    let mut groups = update.to_vec();
    let cost = |group: usize| shapes[group].cost(request.layout);
    groups.sort_by_key(|&group| Reverse(cost(group)));
    let mut loads = vec![(0, 0); request.world_size];
    groups.retain(|&group| {
        let rank = (0..loads.len())
            .min_by_key(|&rank| loads[rank])
            .expect("at least one rank");
        loads[rank] = (loads[rank].0 + cost(group), loads[rank].1 + 1);
        rank == request.rank
    });
    groups
}

/// Every group once. All updates are full but the last.
fn order(shapes: &[Shape], request: &Request) -> Vec<usize> {
    let length = |&group: &usize| Reverse(shapes[group].length(request.layout));
    let mut order: Vec<usize> = (0..shapes.len()).collect();
    if request.order == Order::Sorted {
        order.sort_by_key(length);
        return order;
    }
    let mut random = random(request.seed, request.epoch);
    shuffle(&mut order, &mut random);
    if request.order == Order::LengthGrouped {
        let size = request.groups_per_update.min(order.len().max(1));
        let full = order.len() / size * size;
        for window in order[..full].chunks_mut(size.saturating_mul(WINDOW)) {
            window.sort_by_key(length);
        }
        let mut updates: Vec<&[usize]> = order[..full].chunks(size).collect();
        shuffle(&mut updates, &mut random);
        updates.push(&order[full..]);
        return updates.concat();
    }
    order
}

fn random(seed: u64, epoch: u64) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    ChaCha8Rng::from_seed(bytes)
}

/// Fisher and Yates; our own, so that no dependency's release changes an order.
fn shuffle<T>(items: &mut [T], random: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(last as u64 + 1, random) as usize);
    }
}

/// A uniform number below `bound`, without bias (Lemire 2019).
fn below(bound: u64, random: &mut ChaCha8Rng) -> u64 {
    loop {
        let product = u128::from(random.next_u64()) * u128::from(bound);
        if product as u64 >= bound.wrapping_neg() % bound {
            return (product >> 64) as u64;
        }
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
            "padded" => Ok(Self::Padded),
            _ => Err(Error::Invalid(format!(
                "layout must be shared or padded, not {name:?}"
            ))),
        }
    }
}
