//! Where each array of a batch lies in the one buffer that holds them all.

use super::{Dtype, Field};
use crate::{Error, Result};

/// Arrays begin at multiples of this many bytes: a cache line, and enough for every device.
const ALIGNMENT: usize = 64;

/// Where one array lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which array.
    pub field: Field,
    /// Its first byte.
    pub offset: usize,
    /// Its rows, if it is a matrix.
    pub rows: Option<usize>,
    /// Its elements, or those of a row.
    pub width: usize,
}

/// The arrays of a batch, in the order in which they lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Entry {
    /// The type of its elements.
    pub fn dtype(&self) -> Dtype {
        self.field.dtype()
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.rows.unwrap_or(1) * self.width * self.dtype().size()
    }
}

impl Table {
    pub(super) fn push(&mut self, field: Field, rows: Option<usize>, width: usize) {
        let entry = Entry {
            field,
            offset: self.bytes,
            rows,
            width,
        };
        self.bytes = (entry.offset + entry.bytes()).next_multiple_of(ALIGNMENT);
        self.entries.push(entry);
    }

    /// Every array.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Where an array lies, if it was laid out.
    pub fn get(&self, field: Field) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.field == field)
    }

    /// Bytes that all arrays take up together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Cuts a buffer into the arrays' bytes.
    pub(super) fn split<'a>(&self, arena: &'a mut [u8]) -> Result<Vec<(Field, &'a mut [u8])>> {
        let (found, needed) = (arena.len(), self.bytes);
        if found < needed {
            let reason = format!("the batch needs {needed} bytes and the buffer has {found}");
            return Err(Error::Invalid(reason));
        }
        if !(arena.as_ptr() as usize).is_multiple_of(size_of::<i64>()) {
            let reason = "the buffer must begin at a multiple of 8 bytes";
            return Err(Error::Invalid(reason.into()));
        }
        let (mut rest, mut at, mut parts) = (arena, 0, Vec::with_capacity(self.entries.len()));
        for entry in &self.entries {
            let (part, after) = rest[entry.offset - at..].split_at_mut(entry.bytes());
            parts.push((entry.field, part));
            (rest, at) = (after, entry.offset + entry.bytes());
        }
        Ok(parts)
    }
}
