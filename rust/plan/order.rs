//! The order in which an epoch visits its groups.

use super::{
    Layout, Order, Request, Shape, mixture,
    random::{random, shuffle},
    threads,
};

/// Updates whose groups are sorted by length together: enough that an update holds similar
/// lengths, few enough that the order of an epoch stays random.
const WINDOW: usize = 64;

/// The stream of random numbers that orders an epoch; datasets draw from those above it.
const EPOCH: u64 = 0;

/// Every group of the epoch. All updates are full but the last.
pub(super) fn epoch(shapes: &[Shape], request: &Request<'_>) -> Vec<u32> {
    let mut order = match request.mixture {
        Some(mixture) => mixture::draw(mixture, request.seed, request.epoch),
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
    threads::each(&mut order[..full], size.saturating_mul(WINDOW), |window| {
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
