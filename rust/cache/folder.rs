//! A cache's folder: whose it is, what it keeps of a completion, and what its files are called.

use std::{
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    process,
    sync::Arc,
};

use super::disk::{Disk, Os};

/// What the names of journals end in.
pub const JOURNAL: &str = "journal";
/// What the names of sealed shards end in.
pub const SHARD: &str = "arrow";
/// What the names of manifests end in.
pub const MANIFEST: &str = "manifest.json";
/// What the names of unfinished files end in. No reader opens them.
pub const PARTIAL: &str = "partial";
/// Bytes that a folder grows by for a new name, at most: what a full disk must have room for.
pub const NAMES: usize = 4096;

/// 256 bits that name a reference model: its weights, configuration and precision.
pub type Fingerprint = [u8; 32];

/// One reference's folder of log-probs: where it is, whose it is and what it keeps.
///
/// ```
/// use logratio::cache::{Cache, ReadMode};
///
/// let root = tempfile::tempdir()?;
/// let cache = Cache::new(root.path().join("reference"), [7; 32]);
/// let mut writer = cache.writer()?;
/// writer.append(&[[9; 32]], &[0, 2], &[-0.5, -1.25])?; // durable from here on
/// writer.seal()?;
///
/// let reader = cache.open(ReadMode::Map)?;
/// let rows = reader.join(&[[9; 32], [8; 32]])?;
/// assert_eq!(rows[1], -1);
/// assert_eq!(reader.read(&rows[..1])?, (vec![0, 2], vec![-0.5, -1.25]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cache {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) folder: PathBuf,
    pub(super) fingerprint: Fingerprint,
    pub(super) kind: ValueKind,
    pub(super) tolerance: f32,
}

impl Cache {
    /// The per-token log-probs of one reference in `folder`.
    pub fn new(folder: impl Into<PathBuf>, fingerprint: Fingerprint) -> Self {
        Self {
            disk: Arc::new(Os),
            folder: folder.into(),
            fingerprint,
            kind: ValueKind::PerToken,
            tolerance: TOLERANCE,
        }
    }

    /// The same folder with values of another kind.
    #[must_use]
    pub fn with_kind(self, kind: ValueKind) -> Self {
        Self { kind, ..self }
    }

    /// The same folder, whose records of one key may be this far apart: two batches of a reference
    /// that computes in bfloat16 are further apart than [`TOLERANCE`].
    #[must_use]
    pub fn with_tolerance(self, tolerance: f32) -> Self {
        Self { tolerance, ..self }
    }

    /// The same folder on other files.
    #[must_use]
    pub fn on(self, disk: Arc<dyn Disk>) -> Self {
        Self { disk, ..self }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path for a file that is about to be written.
    pub(super) fn new_partial(&self) -> PathBuf {
        self.path(&format!("{}.{PARTIAL}", writer_name(random_id())))
    }

    /// The path of one of its files.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Largest value that can be a log-prob: above it, rounding cannot explain a value greater than 0.
pub const LARGEST: f32 = 1e-3;

/// Two log-probs of one token further apart than this do not come from one float32 reference; nor
/// two sums further apart than this times the root of their number of tokens.
pub const TOLERANCE: f32 = 1e-3;

/// The two kinds of values, in separate folders.
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

/// A number that no other file of this process has.
pub fn random_id() -> u64 {
    RandomState::new().hash_one(process::id())
}

/// `<host>-<pid>-<random>`, which no other writer has.
pub fn writer_name(id: u64) -> String {
    format!("{}-{}-{id:016x}", host(), process::id())
}

/// This machine's name, in letters and digits.
pub fn host() -> String {
    let host = gethostname::gethostname();
    host.to_string_lossy()
        .replace(|letter: char| !letter.is_ascii_alphanumeric(), "_")
}

/// The file name of the manifest of a shard with this one.
pub fn manifest_name(shard: &str) -> String {
    let stem = shard.split('.').next().unwrap_or_default();
    format!("{stem}.{MANIFEST}")
}

/// Whether this is a shard of the folder, and no path to another place.
pub fn is_shard_name(shard: &str) -> bool {
    let stem = shard.strip_suffix(&format!(".{SHARD}"));
    stem.is_some_and(|stem| stem.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}
