#![doc = include_str!("FORMAT.md")]

mod checkpoint;
mod column_writer;
mod duplicates;
mod format;
mod partial;
mod reader;
mod verify;
mod writer;

pub use duplicates::Outcome;
pub use reader::{Store, StoredCompletion, StoredGroup};
pub use writer::{Bulk, StoreWriter};
