//! Which groups an epoch visits, and in which order.
//!
//! An order depends on the seed and the epoch only, on every machine and with every later release:
//! the generator is a named one and the shuffle is written here.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use super::request::{Mixture, Order, Request};
use crate::{
    group::{Layout, Shape},
    parallel,
};

/// Updates whose groups are sorted by length together: enough that an update holds similar
/// lengths, few enough that the order of an epoch stays random.
const WINDOW: usize = 64;

/// The stream of random numbers that orders an epoch; datasets draw from those above it.
const EPOCH: u64 = 0;

/// Every group of the epoch. All updates are full but the last.
pub(super) fn epoch(shapes: &[Shape], request: &Request<'_>) -> Vec<u32> {
    let mut order = match request.mixture {
        Some(mixture) => draw(mixture, request.seed, request.epoch),
        None => (0..shapes.len() as u32).collect(),
    };
    let size = request.groups_per_update.min(order.len().max(1));
    if request.order == Order::Sorted {
        sort(shapes, request.layout, &mut order);
        return order;
    }
    let mut random = random(request.seed, request.epoch, EPOCH);
    shuffle(&mut order, &mut random);
    if request.order == Order::Shuffled {
        return order;
    }
    let full = order.len() / size * size;
    parallel::chunks(&mut order[..full], size.saturating_mul(WINDOW), |window| {
        sort(shapes, request.layout, window);
    });
    let mut updates: Vec<u32> = (0..(full / size) as u32).collect();
    shuffle(&mut updates, &mut random);
    let mut shuffled = Vec::with_capacity(order.len());
    for update in updates {
        let start = update as usize * size;
        shuffled.extend_from_slice(&order[start..start + size]);
    }
    shuffled.extend_from_slice(&order[full..]);
    shuffled
}

/// Longest first; what is equally long keeps its order.
fn sort(shapes: &[Shape], layout: Layout, groups: &mut [u32]) {
    // Length and place in one number: sorted without looking anything up, and stable.
    let mut keys: Vec<u64> = groups
        .iter()
        .zip(0u64..)
        .map(|(&group, at)| u64::from(!shapes[group as usize].length(layout)) << 32 | at)
        .collect();
    keys.sort_unstable();
    let before = groups.to_vec();
    for (group, key) in groups.iter_mut().zip(keys) {
        *group = before[key as u32 as usize];
    }
}

/// The groups of an epoch, dataset by dataset.
fn draw(mixture: Mixture<'_>, seed: u64, epoch: u64) -> Vec<u32> {
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

/// A separate generator for each number `at` of each `stream` of a seed.
fn random(seed: u64, at: u64, stream: u64) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&at.to_le_bytes());
    bytes[16..24].copy_from_slice(&stream.to_le_bytes());
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
        let low = product as u64;
        // The division is for the few products that could be biased.
        if low >= bound || low >= bound.wrapping_neg() % bound {
            return (product >> 64) as u64;
        }
    }
}
