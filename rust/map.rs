//! Read-only memory maps: the one module that may be unsafe.
#![allow(unsafe_code)]

use std::{fs::File, ops::Deref, path::Path};

use memmap2::{Mmap, MmapMut};

use crate::{Error, Result};

/// Bytes that are never written again: a sealed file, or a copy in memory.
///
/// Always aligned to a page. A sealed file that another process cuts while it is mapped kills this
/// one with SIGBUS: stores are written beside their name and renamed, never changed in place.
#[derive(Debug)]
pub struct Map(Mmap);

impl Map {
    /// Maps the file at `path`, which nobody may change any more.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read-only and only sealed files are mapped, so the bytes behind the
        // slice do not change while it lives.
        let map = unsafe { Mmap::map(&file) };
        map.map(Self).map_err(Error::io(path))
    }

    /// Copies `bytes` to memory of its own.
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
