//! A journal as a table: where each record lies, sorted by key.

use std::path::{Path, PathBuf};

use bytemuck::Pod;

use super::{
    Cache, Kind,
    disk::DiskFile,
    scan::{Record, scan},
};
use crate::{Error, Result, fingerprint::Key};

/// A journal whose every byte was checked when it was opened. Holds 48 bytes a record in memory and
/// no values.
#[derive(Debug)]
pub struct JournalTable {
    path: PathBuf,
    file: Box<dyn DiskFile>,
    kind: Kind,
    records: Vec<Record>,
    /// Bytes behind the last whole block.
    pub torn: u64,
    /// Bytes that were there when it was opened.
    pub length: u64,
}

impl JournalTable {
    pub fn open(cache: &Cache, path: PathBuf) -> Result<Self> {
        let file = cache.disk.open(&path).map_err(Error::io(&path))?;
        Self::of(cache, path, file)
    }

    /// Reads a journal that is open.
    pub fn of(cache: &Cache, path: PathBuf, file: Box<dyn DiskFile>) -> Result<Self> {
        let contents = scan(&path, &*file, &cache.fingerprint, cache.kind)?;
        let mut records = contents.records;
        records.sort_unstable_by_key(|record| (record.key, record.offset));
        Ok(Self {
            path,
            file,
            kind: cache.kind,
            records,
            torn: contents.torn,
            length: contents.length,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn rows(&self) -> u64 {
        self.records.len() as u64
    }

    pub fn all_tokens(&self) -> u64 {
        let tokens = |record: &Record| u64::from(record.tokens);
        self.records.iter().map(tokens).sum()
    }

    pub fn key(&self, row: u64) -> Key {
        self.records[row as usize].key
    }

    pub fn tokens(&self, row: u64) -> u32 {
        self.records[row as usize].tokens
    }

    /// Appends the values of a row to `out`; returns its number of tokens.
    pub fn values<T: Pod>(&self, row: u64, out: &mut Vec<T>) -> Result<u32> {
        let Record { offset, tokens, .. } = self.records[row as usize];
        let before = out.len();
        out.resize(
            before + self.kind.bytes(tokens) / size_of::<T>(),
            T::zeroed(),
        );
        let bytes = bytemuck::cast_slice_mut(&mut out[before..]);
        self.read(offset, bytes)?;
        match self.kind.impossible(bytes) {
            None => Ok(tokens),
            Some((_, value)) => {
                let reason = format!("byte {offset} and on hold the log-prob {value}");
                Err(Error::cache(&self.path, reason))
            }
        }
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.file.read_at(bytes, at);
        read.map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::cache(&self.path, "it was cut after it was opened")
            }
            _ => Error::io(&self.path)(error),
        })
    }
}
