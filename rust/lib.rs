//! Groups, plans, layouts and the reference cache of `logratio`.
//!
//! ```text
//! group        one prompt and K completions, as ids             group.rs
//!   │ StoreWriter::push
//! store        every group in flat, memory-mapped columns       store/
//!   │ plan     seeded order, token budget, rank's share         plan/
//!   │ tree     groups that share a beginning, each token once   prefix_tree.rs
//!   │ layout   shared prompt, tree, padded, or candidates       layout/
//! batch        flat arrays, handed to numpy without a copy      python/
//!   ┆
//! key          content of one completion in its prompt          content_key.rs
//!   │ CacheWriter::append, CacheReader::read
//! cache        the reference's log-probs on disk                cache/
//! ```
//!
//! Everything but `python/` is plain Rust: no Python, no tensors, no tokenizer.

pub mod cache;
pub mod content_key;
pub mod error;
mod file_format;
pub mod group;
pub mod layout;
pub mod mmap;
pub mod pairs;
mod parallel;
pub mod plan;
pub mod prefix_tree;
pub mod similar;
pub mod store;
pub mod token_counts;
pub mod word_cache;

pub use error::{Error, Result};

#[cfg(feature = "python")]
mod python;

const _: () = assert!(
    usize::BITS == 64 && cfg!(target_endian = "little"),
    "files are mapped as they are: logratio needs a 64-bit little-endian machine"
);
