#![doc = include_str!("FORMAT.md")]

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

mod batch;
mod checked;
mod columns;
mod compact;
mod disk;
mod join;
mod journal;
mod journal_table;
mod kind;
mod manifest;
mod merge;
mod reader;
mod scan;
mod seal;
mod shard;
mod shard_seal;
mod shard_writer;
mod snapshot;
mod source;
mod tee;
mod verify;
mod writer;

pub use compact::Compacted;
pub use disk::{Disk, DiskFile, Os};
pub use kind::{Kind, LARGEST, TOLERANCE};
use merge::Agreement;
pub use reader::{CacheReader, Slice};
pub use verify::{Part, Report};
pub use writer::CacheWriter;

/// 256 bits that name a reference model: its weights, configuration and precision.
pub type Fingerprint = [u8; 32];

/// How sealed shards are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadMode {
    /// Mapped: the fastest. A shard that somebody cuts meanwhile kills the process (SIGBUS).
    #[default]
    Map,
    /// By calls to the system, for network file systems: a shard that was cut is an error.
    Pread,
}

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
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    fingerprint: Fingerprint,
    kind: Kind,
    tolerance: f32,
}

impl Cache {
    /// The per-token log-probs of one reference in `folder`.
    pub fn new(folder: impl Into<PathBuf>, fingerprint: Fingerprint) -> Self {
        Self {
            disk: Arc::new(Os),
            folder: folder.into(),
            fingerprint,
            kind: Kind::PerToken,
            tolerance: TOLERANCE,
        }
    }

    /// The same folder with values of another kind.
    #[must_use]
    pub fn with_kind(self, kind: Kind) -> Self {
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

    /// Appends to a new journal.
    pub fn writer(&self) -> crate::Result<CacheWriter> {
        CacheWriter::new(self.clone())
    }

    /// Reads everything that is there now.
    pub fn open(&self, mode: ReadMode) -> crate::Result<CacheReader> {
        CacheReader::new(self, mode)
    }

    fn agreement(&self) -> Agreement {
        Agreement {
            kind: self.kind,
            tolerance: f64::from(self.tolerance),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}
