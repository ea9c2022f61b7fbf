//! A journal as a table: where each record lies, sorted by key.

use std::path::{Path, PathBuf};

use super::{
    Cache,
    disk::DiskFile,
    scan::{Record, scan},
    source::Span,
};
use crate::{Error, Result, fingerprint::Key};

/// A journal whose every byte was checked when it was opened. Holds 48 bytes a record in memory and
/// no values.
#[derive(Debug)]
pub struct JournalTable {
    path: PathBuf,
    file: Box<dyn DiskFile>,
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

    /// Where a row's values lie.
    pub fn span(&self, row: u64) -> Span {
        let Record { offset, tokens, .. } = self.records[row as usize];
        Span { at: offset, tokens }
    }

    /// Fills `out` with a row's values.
    pub fn fill(&self, span: Span, out: &mut [u8]) -> Result<()> {
        self.read(span.at, out)
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
