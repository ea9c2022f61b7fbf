//! Read-only memory maps: the one module that may be unsafe.
#![allow(unsafe_code)]

use std::{fs::File, io, ops::Deref, path::Path};

use memmap2::{Mmap, MmapMut};

use crate::{Error, Result};

/// Bytes that are not written while they are mapped: a sealed file, a copy in memory, or a column
/// whose writer died, under its lock.
///
/// Always aligned to a page. If another process truncates a mapped file, this one is killed (SIGBUS):
/// so stores are written under another name and renamed, never changed in place.
#[derive(Debug)]
pub struct Map(Mmap);

impl Map {
    /// Maps the file at `path`, which must not change while the map lives.
    pub fn open(path: &Path) -> Result<Self> {
        let map = File::open(path).and_then(|file| Self::of(&file));
        map.map_err(Error::io(path))
    }

    /// Maps an open file, under the same condition.
    pub fn of(file: &File) -> io::Result<Self> {
        // SAFETY: the map is read-only. Sealed files never change, and the columns of a writer that
        // died are mapped by the one that holds their lock: it truncates them only after
        // the mapped range, and writes only after the map is dropped.
        unsafe { Mmap::map(file) }.map(Self)
    }

    /// Copies `bytes` to separate memory.
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        let copy = || {
            let mut map = MmapMut::map_anon(bytes.len())?;
            map.copy_from_slice(bytes);
            map.make_read_only()
        };
        copy().map(Self).map_err(Error::io(Path::new("<memory>")))
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
