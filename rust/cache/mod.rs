#![doc = include_str!("FORMAT.md")]

mod journal;
mod reader;
mod writer;

pub use reader::CacheReader;
pub use writer::CacheWriter;

/// 256 bits that name a reference model: its weights, configuration and precision.
pub type Fingerprint = [u8; 32];

/// Log-probs above this are no rounding of 0: something else was stored.
pub const LARGEST: f32 = 1e-3;

/// Two log-probs of one token further apart than this do not come from one reference.
pub const TOLERANCE: f32 = 1e-3;

/// The first value that cannot be a log-prob, and its place.
fn impossible(values: impl IntoIterator<Item = f32>) -> Option<(usize, f32)> {
    let possible = |value: f32| value.is_finite() && value <= LARGEST;
    values
        .into_iter()
        .enumerate()
        .find(|&(_, value)| !possible(value))
}
