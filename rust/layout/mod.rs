//! Groups as the flat arrays that a model reads, in one buffer of the caller.
//!
//! All training layouts describe the same conditionals: target `s` is token `target_ids[s]`,
//! predicted at `logit_index[s]`, and targets always come group by group, completion by completion,
//! whatever the order of the rows.

mod batch;
mod candidates;
mod field;
mod padded;
mod shared;
mod table;
mod targets;
mod tree;

use std::str::FromStr;

pub use batch::Batch;
pub use candidates::Candidates;
pub use field::{Dtype, Field};
pub use table::{Entry, Table};

use crate::{Error, Result, group::Layout};

/// Where the padding of a row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Before its tokens.
    Left,
    /// After its tokens.
    Right,
}

/// How to lay out a batch.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// One row of groups end to end, one row of their tree, or one row a completion.
    pub layout: Layout,
    /// Where the padding of the padded layout is.
    pub side: Side,
    /// The width `T` is rounded up to a multiple of this.
    pub multiple_of: usize,
    /// The width `T` is this, whatever the batch.
    pub width: Option<usize>,
    /// The id in padding.
    pub pad_id: i32,
    /// The arrays to lay out; none: those of [`Field::usual`].
    pub fields: &'a [Field],
}

impl Options<'_> {
    /// As training reads it: right-padded with 0, as wide as the batch needs.
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            side: Side::Right,
            multiple_of: 1,
            width: None,
            pad_id: 0,
            fields: &[],
        }
    }

    /// The width of a batch that needs `needed` tokens in its longest row.
    fn width(&self, needed: usize) -> Result<usize> {
        let width = match (self.width, self.multiple_of) {
            (_, 0) => return Err(Error::Invalid("multiple_of must be at least 1".into())),
            (Some(width), multiple) => width.next_multiple_of(multiple),
            (None, multiple) => needed.next_multiple_of(multiple),
        };
        if width < needed {
            let reason = format!("a row of {needed} tokens does not fit in a width of {width}");
            return Err(Error::Invalid(reason));
        }
        Ok(width)
    }
}

impl FromStr for Side {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "left" => Ok(Self::Left),
            "right" => Ok(Self::Right),
            _ => Err(Error::Invalid(format!(
                "side must be left or right, not {name:?}"
            ))),
        }
    }
}
