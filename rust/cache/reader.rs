//! All journals of a folder as one table, sorted by key.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::{Fingerprint, TOLERANCE, journal};
use crate::{Error, Result, error, fingerprint::Key};

/// The log-probs of one reference, as its folder stood when it was opened.
///
/// Every byte is checked at open. Reading afterwards fetches values from the journals, so memory
/// holds 48 bytes a completion and no values; impossible values are refused again.
#[derive(Debug)]
pub struct CacheReader {
    journals: Vec<(PathBuf, File)>,
    rows: Vec<Row>,
    torn_bytes: u64,
    duplicates: usize,
}

/// A record and its journal. Rows are numbered in the order of their keys.
#[derive(Clone, Copy, Debug)]
struct Row {
    key: Key,
    journal: u32,
    count: u32,
    offset: u64,
}

impl CacheReader {
    /// Reads every `*.journal` of `folder`, which may be in use by any number of writers.
    ///
    /// A torn last block is skipped and counted. Damage before a whole block, a journal of another
    /// reference and two records that contradict each other are errors.
    pub fn open(folder: &Path, fingerprint: &Fingerprint) -> Result<Self> {
        let mut reader = Self {
            journals: Vec::new(),
            rows: Vec::new(),
            torn_bytes: 0,
            duplicates: 0,
        };
        for path in journals(folder)? {
            reader.take(path, fingerprint)?;
        }
        reader
            .rows
            .sort_unstable_by_key(|row| (row.key, row.journal, row.offset));
        reader.merge()?;
        Ok(reader)
    }

    fn take(&mut self, path: PathBuf, fingerprint: &Fingerprint) -> Result<()> {
        let file = match File::open(&path) {
            // Its writer closed it without a block.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.map_err(Error::io(&path))?,
        };
        let contents = journal::scan(&path, &file, fingerprint)?;
        let journal = self.journals.len() as u32;
        self.torn_bytes += contents.torn;
        self.rows.extend(contents.records.into_iter().map(|record| {
            let journal::Record { key, offset, count } = record;
            Row {
                key,
                journal,
                count,
                offset,
            }
        }));
        self.journals.push((path, file));
        Ok(())
    }

    /// Keeps the first row of every key.
    fn merge(&mut self) -> Result<()> {
        let mut rows = std::mem::take(&mut self.rows);
        let records = rows.len();
        let mut agreed = Ok(());
        rows.dedup_by(|later, first| {
            let same = later.key == first.key;
            if same && agreed.is_ok() {
                agreed = self.agree(first, later);
            }
            same
        });
        self.duplicates = records - rows.len();
        self.rows = rows;
        agreed
    }

    /// Two batches of one model round differently; anything beyond that is a contradiction.
    fn agree(&self, first: &Row, later: &Row) -> Result<()> {
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE;
        let (one, other) = (self.values(first)?, self.values(later)?);
        if one.len() == other.len() && one.iter().zip(&other).all(close) {
            return Ok(());
        }
        let reason = format!(
            "its record at byte {} contradicts the one of the same key at byte {} of {}",
            later.offset,
            first.offset,
            self.path(first).display()
        );
        Err(Error::cache(self.path(later), reason))
    }

    fn path(&self, row: &Row) -> &Path {
        &self.journals[row.journal as usize].0
    }

    fn values(&self, row: &Row) -> Result<Vec<f32>> {
        let mut values = vec![0.0; row.count as usize];
        self.fill(row, &mut values)?;
        Ok(values)
    }

    fn fill(&self, row: &Row, values: &mut [f32]) -> Result<()> {
        let (path, file) = &self.journals[row.journal as usize];
        journal::read_values(path, file, row.offset, values)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Number of log-probs of all rows.
    pub fn tokens(&self) -> u64 {
        self.rows.iter().map(|row| u64::from(row.count)).sum()
    }

    /// Bytes behind the last whole block of the journals: unacknowledged, never read.
    pub fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    /// Records left out because another with their key came first.
    pub fn duplicates(&self) -> usize {
        self.duplicates
    }

    /// The row of each key, -1 where there is none.
    pub fn join(&self, keys: &[Key]) -> Vec<i64> {
        let find = |key| self.rows.binary_search_by(|row| row.key.cmp(key));
        keys.iter()
            .map(|key| find(key).map_or(-1, |row| row as i64))
            .collect()
    }

    /// The log-probs of `rows` end to end, and where each row's begin: `[n+1]`.
    pub fn read(&self, rows: &[i64]) -> Result<(Vec<i64>, Vec<f32>)> {
        let find = |&row: &i64| Ok(&self.rows[error::index("row", row, self.rows.len())?]);
        let rows: Vec<&Row> = rows.iter().map(find).collect::<Result<_>>()?;
        let mut offsets = Vec::with_capacity(rows.len() + 1);
        let mut values = vec![0.0; rows.iter().map(|row| row.count as usize).sum()];
        let mut end = 0;
        offsets.push(0);
        for row in rows {
            let start = end;
            end += row.count as usize;
            self.fill(row, &mut values[start..end])?;
            offsets.push(end as i64);
        }
        Ok((offsets, values))
    }
}

/// The journals of a folder by name, so that which of two records comes first is the same everywhere.
fn journals(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    let mut paths = list().map_err(Error::io(folder))?;
    paths.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "journal")
    });
    paths.sort_unstable();
    Ok(paths)
}
