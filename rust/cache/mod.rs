#![doc = include_str!("FORMAT.md")]

mod compact;
mod disk;
mod folder;
mod journal;
mod listing;
mod reader;
mod shard;
mod shard_format;
mod shard_writer;
mod source;
mod verify;
mod writer;

pub use compact::Compacted;
pub use disk::{Disk, DiskFile, Os, ReadMode};
pub use folder::{Cache, Fingerprint, LARGEST, TOLERANCE, ValueKind};
pub use reader::{CacheReader, Slice};
pub use verify::{Part, Report};
pub use writer::CacheWriter;
