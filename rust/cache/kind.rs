//! What a cache keeps of a completion: every log-prob, or their sum.

/// The two kinds of values, in folders of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The log-prob of every token, f32.
    PerToken = 0,
    /// The sum over the tokens that count, f64; the key then covers the mask.
    Sums = 1,
}

/// Log-probs above this are no rounding of 0: something else was stored.
pub const LARGEST: f32 = 1e-3;

impl Kind {
    /// The kind with this number in a file.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        [Self::PerToken, Self::Sums]
            .into_iter()
            .find(|kind| *kind as u32 == number)
    }

    /// As it stands in manifests.
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
            Self::PerToken => find(values.as_chunks().0, |bytes| {
                f64::from(f32::from_le_bytes(bytes))
            }),
            Self::Sums => find(values.as_chunks().0, f64::from_le_bytes),
        }
    }

    /// Whether two records of one key may come from two batches of one reference.
    pub(crate) fn agree(self, one: &[u8], other: &[u8], tokens: u32) -> bool {
        let (one_value, tolerance) = (
            f64::from(TOLERANCE),
            f64::from(TOLERANCE) * f64::from(tokens),
        );
        let same = one.len() == other.len();
        same && match self {
            Self::PerToken => {
                let value = |bytes| f64::from(f32::from_le_bytes(bytes));
                close(one.as_chunks().0, other.as_chunks().0, value, one_value)
            }
            Self::Sums => {
                let value = f64::from_le_bytes;
                close(one.as_chunks().0, other.as_chunks().0, value, tolerance)
            }
        }
    }
}

/// Two log-probs of one token (or two sums of one completion, for each of its tokens) further apart
/// than this do not come from one reference.
pub const TOLERANCE: f32 = 1e-3;

fn find<const N: usize>(
    values: &[[u8; N]],
    value: impl Fn([u8; N]) -> f64,
) -> Option<(usize, f64)> {
    let possible = |value: f64| value <= f64::from(LARGEST) && value.is_finite();
    // Without an early end the compiler does several at once.
    let all = values
        .iter()
        .fold(true, |all, &bytes| all & possible(value(bytes)));
    if all {
        return None;
    }
    values
        .iter()
        .map(|&bytes| value(bytes))
        .enumerate()
        .find(|&(_, value)| !possible(value))
}

fn close<const N: usize>(
    one: &[[u8; N]],
    other: &[[u8; N]],
    value: impl Fn([u8; N]) -> f64,
    tolerance: f64,
) -> bool {
    one.iter()
        .zip(other)
        .all(|(&one, &other)| (value(one) - value(other)).abs() <= tolerance)
}
