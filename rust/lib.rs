//! Groups, plans, layouts and the reference cache of `logratio`.
//!
//! ```text
//! group        one prompt and K completions, as ids             group.rs
//!   │ StoreWriter::push
//! store        every group in flat, memory-mapped columns       store/
//!   │ plan     seeded order, token budget, rank's share         plan.rs
//!   │ tree     groups that share a beginning, each token once   tree.rs
//!   │ layout   shared prompt, tree, padded, or candidates       layout/
//! batch        flat arrays, handed to numpy without a copy      python/
//!   ┆
//! key          content of one completion in its prompt          fingerprint.rs
//!   │ CacheWriter::append, CacheReader::read
//! cache        the reference's log-probs on disk                cache/
//! ```
//!
//! Everything but `python/` is plain Rust: no Python, no tensors, no tokenizer.

pub mod cache;
pub mod census;
pub mod error;
pub mod fingerprint;
pub mod group;
pub mod layout;
pub mod map;
pub mod pairs;
pub mod pieces;
pub mod plan;
pub mod similar;
pub mod store;
pub mod tree;
mod wire;

pub use error::{Error, Result};

#[cfg(feature = "python")]
mod python;

const _: () = assert!(
    usize::BITS == 64 && cfg!(target_endian = "little"),
    "files are mapped as they are: logratio needs a 64-bit little-endian machine"
);
