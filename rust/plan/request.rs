//! What a plan is asked for: order, budget, rank, and the weights of mixed datasets.

use std::str::FromStr;

use crate::{Error, Result, group::Layout, store::Store};

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

    pub(super) fn check(&self, groups: usize) -> Result<()> {
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

/// How much of an epoch each dataset gives.
///
/// An epoch has as many groups as there are. Dataset `d` gives its weight's share of them, rounded
/// by largest remainder, drawn without replacement from one shuffled pass over `d` after another.
/// The passes continue over the epochs, so no group of `d` is ever ahead of another by more than one.
#[derive(Clone, Copy, Debug)]
pub struct Mixture<'a> {
    /// Of each dataset: `[D]`, at least 0; only their ratios count.
    pub weights: &'a [f64],
    /// Number of the dataset of each group: `[G]`.
    pub dataset_of: &'a [u32],
}

/// The dataset of each group, from its file: `files` `[G]`, `datasets` the dataset of each file.
pub fn dataset_of(files: &[u32], datasets: &[u32]) -> Result<Vec<u32>> {
    let of = |&file: &u32| {
        datasets.get(file as usize).copied().ok_or_else(|| {
            let known = datasets.len();
            Error::Invalid(format!(
                "file {file} is in no dataset: datasets names {known}"
            ))
        })
    };
    files.iter().map(of).collect()
}

impl Mixture<'_> {
    fn check(&self, groups: usize) -> Result<()> {
        let total: f64 = self.weights.iter().sum();
        let whole = self
            .weights
            .iter()
            .all(|weight| weight.is_finite() && *weight >= 0.0);
        let reason = if !whole || !total.is_finite() || (groups > 0 && total <= 0.0) {
            format!(
                "weights must be at least 0 and not all 0: {:?}",
                self.weights
            )
        } else if self.dataset_of.len() != groups {
            format!(
                "datasets are given for {} groups, but there are {groups}",
                self.dataset_of.len()
            )
        } else if let Some(dataset) = self
            .dataset_of
            .iter()
            .find(|&&dataset| dataset as usize >= self.weights.len())
        {
            format!(
                "dataset {dataset} has no weight: there are {}",
                self.weights.len()
            )
        } else if let Some((empty, weight)) = self.weighted_but_empty(groups) {
            format!("dataset {empty} has weight {weight} and no group")
        } else {
            return Ok(());
        };
        Err(Error::Invalid(reason))
    }

    fn weighted_but_empty(&self, groups: usize) -> Option<(usize, f64)> {
        let sizes = self.sizes();
        let mut weighted = self.weights.iter().copied().enumerate();
        weighted.find(|&(dataset, weight)| groups > 0 && weight > 0.0 && sizes[dataset] == 0)
    }

    /// Groups of each dataset.
    pub(super) fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.weights.len()];
        for &dataset in self.dataset_of {
            sizes[dataset as usize] += 1;
        }
        sizes
    }

    /// Groups that each dataset gives to an epoch.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "a share of a count, at least 0"
    )]
    pub(super) fn counts(&self) -> Vec<usize> {
        let (groups, total) = (self.dataset_of.len(), self.weights.iter().sum::<f64>());
        let shares = self
            .weights
            .iter()
            .map(|weight| groups as f64 * (weight / total));
        let (mut counts, mut remainders) = (Vec::new(), Vec::new());
        for (dataset, share) in shares.enumerate() {
            counts.push(share as usize);
            if share > 0.0 {
                remainders.push((dataset, share.fract()));
            }
        }
        remainders.sort_by(|one, other| other.1.total_cmp(&one.1));
        let missing = groups.saturating_sub(counts.iter().sum());
        for &(dataset, _) in remainders.iter().cycle().take(missing) {
            counts[dataset] += 1;
        }
        counts
    }
}
