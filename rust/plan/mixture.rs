//! Datasets mixed by weight: what each gives to an epoch, and which groups.

use super::random::{random, shuffle};
use crate::{Error, Result};

/// How much of an epoch each dataset gives.
///
/// An epoch has as many groups as there are. Dataset `d` gives its weight's share of them, rounded
/// by largest remainder, drawn without replacement from one shuffled pass over `d` after another.
/// The passes go on over the epochs, so no group of `d` is ever ahead of another by more than one.
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
    pub(super) fn check(&self, groups: usize) -> Result<()> {
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
    fn sizes(&self) -> Vec<usize> {
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
    fn counts(&self) -> Vec<usize> {
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

/// The groups of an epoch, dataset by dataset.
pub(super) fn draw(mixture: Mixture<'_>, seed: u64, epoch: u64) -> Vec<u32> {
    let mut members: Vec<Vec<u32>> = mixture
        .sizes()
        .into_iter()
        .map(Vec::with_capacity)
        .collect();
    for (group, &dataset) in mixture.dataset_of.iter().enumerate() {
        members[dataset as usize].push(group as u32);
    }
    let mut drawn = Vec::with_capacity(mixture.dataset_of.len());
    for (stream, (count, members)) in (1u64..).zip(mixture.counts().into_iter().zip(&members)) {
        let mut left = count;
        let first = u128::from(epoch) * count as u128;
        while left > 0 {
            let at = first + (count - left) as u128;
            let (pass, start) = (at / members.len() as u128, at % members.len() as u128);
            let mut shuffled = members.clone();
            shuffle(&mut shuffled, &mut random(seed, pass as u64, stream));
            let rest = &shuffled[start as usize..];
            drawn.extend_from_slice(&rest[..rest.len().min(left)]);
            left -= rest.len().min(left);
        }
    }
    drawn
}
