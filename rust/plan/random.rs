//! Orders that depend on a few numbers only, on every machine and with every later release.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// A generator of its own for each number `at` of each `stream` of a seed.
pub(super) fn random(seed: u64, at: u64, stream: u64) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&at.to_le_bytes());
    bytes[16..24].copy_from_slice(&stream.to_le_bytes());
    ChaCha8Rng::from_seed(bytes)
}

/// Fisher and Yates; our own, so that no dependency's release changes an order.
pub(super) fn shuffle<T>(items: &mut [T], random: &mut ChaCha8Rng) {
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
