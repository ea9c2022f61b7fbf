//! The values of a completion: every log-prob, or their sum; and what no log-prob can be.

/// Largest value that can be a log-prob: above it, rounding cannot explain a value greater than 0.
pub const LARGEST: f32 = 1e-3;

/// Two log-probs of one token further apart than this do not come from one float32 reference; nor
/// two sums further apart than this times the root of their number of tokens.
pub const TOLERANCE: f32 = 1e-3;

/// The two kinds of values, in folders of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// The log-prob of every token, f32.
    PerToken = 0,
    /// The sum over the tokens that count, f64; the key then covers the mask.
    Sums = 1,
}

impl ValueKind {
    /// The kind with this number in a file.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        [Self::PerToken, Self::Sums]
            .into_iter()
            .find(|kind| *kind as u32 == number)
    }

    /// Its name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerToken => "per-token",
            Self::Sums => "sums",
        }
    }

    /// Bytes of one value.
    pub(crate) fn width(self) -> usize {
        match self {
            Self::PerToken => 4,
            Self::Sums => 8,
        }
    }

    /// Bytes of the values of a completion with `tokens` tokens.
    pub(crate) fn bytes(self, tokens: u32) -> usize {
        match self {
            Self::PerToken => 4 * tokens as usize,
            Self::Sums => 8,
        }
    }

    /// The first value that cannot be a log-prob, and its place.
    pub(crate) fn impossible(self, values: &[u8]) -> Option<(usize, f64)> {
        match self {
            Self::PerToken => {
                let possible = |value| value <= LARGEST && value > f32::NEG_INFINITY;
                let (at, value) = find(values.as_chunks().0, f32::from_le_bytes, possible)?;
                Some((at, f64::from(value)))
            }
            Self::Sums => {
                let possible = |value| value <= f64::from(LARGEST) && value > f64::NEG_INFINITY;
                find(values.as_chunks().0, f64::from_le_bytes, possible)
            }
        }
    }
}

fn find<const N: usize, T: Copy>(
    values: &[[u8; N]],
    value: impl Fn([u8; N]) -> T,
    possible: impl Fn(T) -> bool,
) -> Option<(usize, T)> {
    // Without an early end the compiler does several at once.
    let all = values
        .iter()
        .fold(true, |all, &bytes| all & possible(value(bytes)));
    if all {
        return None;
    }
    let mut values = values.iter().map(|&bytes| value(bytes)).enumerate();
    values.find(|&(_, value)| !possible(value))
}

/// The first byte of a record's values in its file, and its number of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub at: u64,
    pub tokens: u32,
}

/// Why values with this number are not of `kind`.
pub fn wrong_kind(found: u32, kind: ValueKind) -> Option<String> {
    let name = ValueKind::from_number(found).map_or("unknown", ValueKind::name);
    (found != kind as u32).then(|| format!("it holds {name} values, not {}", kind.name()))
}
