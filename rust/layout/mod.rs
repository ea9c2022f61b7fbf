//! Groups as the flat arrays that a model reads, in one buffer of the caller.
//!
//! All training layouts describe the same conditionals: target `s` is token `target_ids[s]`,
//! predicted at `logit_index[s]`, and targets always come group by group, completion by completion,
//! whatever the order of the rows.

mod batch;
mod candidates;
mod fields;
mod padded;
mod shared;
mod targets;
mod tree;

pub use batch::Batch;
pub use candidates::Candidates;
pub use fields::{Dtype, Entry, Field, Options, Side, Table};
