//! A small cache with every kind of file, on a disk in memory, to be damaged.
#![allow(dead_code)] // each test crate uses its part

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use logratio::{
    Error, Result,
    cache::{Cache, CacheReader, ReadMode, ValueKind},
    content_key::Key,
};

use crate::sim::{
    SimDisk,
    records::{append, assert_values, key},
};

pub const FOLDER: &str = "/cache/here";
pub const FINGERPRINT: [u8; 32] = [7; 32];
/// Records of a block, and blocks of a writer.
const RECORDS: usize = 20;
const BLOCKS: usize = 3;
const WRITERS: usize = 4;
pub const ALL: usize = RECORDS * BLOCKS * WRITERS;

/// Two shards with their manifests and two journals, about 16 KB.
pub struct Damaged {
    pub disk: SimDisk,
    pub kind: ValueKind,
    pub files: Vec<(PathBuf, Vec<u8>)>,
}

/// What a reader makes of damaged files.
pub enum Verdict {
    Refused(Error),
    /// Without so many records, behind which so many bytes are torn.
    Read {
        lost: usize,
        torn: u64,
    },
}

impl Damaged {
    pub fn new(kind: ValueKind) -> Self {
        let disk = SimDisk::default();
        let cache = cache(&disk, kind);
        for first in 0..WRITERS {
            let mut writer = cache.writer().expect("creates");
            for block in 0..BLOCKS {
                let start = (first * BLOCKS + block) * RECORDS;
                let numbers: Vec<usize> = (start..start + RECORDS).collect();
                append(&mut writer, kind, &numbers).expect("appends");
            }
            if first < 2 {
                writer.seal().expect("seals");
            }
        }
        let files = disk.files(FOLDER.as_ref());
        assert_eq!(files.len(), 6);
        Self { disk, kind, files }
    }

    /// The files whose names end so.
    pub fn ending(&self, ending: &str) -> Vec<&(PathBuf, Vec<u8>)> {
        let name = |path: &Path| path.to_string_lossy().ends_with(ending);
        self.files.iter().filter(|(path, _)| name(path)).collect()
    }

    pub fn journal(&self) -> &(PathBuf, Vec<u8>) {
        self.ending(".journal")[0]
    }

    pub fn cache(&self) -> Cache {
        cache(&self.disk, self.kind)
    }

    /// What is read once these files have these bytes; then they have their own again.
    pub fn with(&self, changes: &[(&Path, Vec<u8>)]) -> (Verdict, bool) {
        for (path, bytes) in changes {
            self.disk.overwrite(path, bytes.clone());
        }
        let verdict = verdict(self.cache().open(ReadMode::Pread));
        let whole = self.cache().verify().expect("lists").is_whole();
        for (path, _) in changes {
            let own = self.files.iter().find(|(own, _)| own == path);
            self.disk
                .overwrite(path, own.expect("one of ours").1.clone());
        }
        (verdict, whole)
    }

    /// Where the blocks of a journal begin, and the last one ends.
    pub fn blocks(bytes: &[u8]) -> Vec<usize> {
        let mut ends = vec![64];
        while let Some(header) = bytes
            .get(ends[ends.len() - 1]..)
            .filter(|rest| !rest.is_empty())
        {
            let payload = u64::from_le_bytes(header[24..32].try_into().expect("eight"));
            ends.push(ends[ends.len() - 1] + 64 + payload as usize);
        }
        ends
    }

    /// Asserts that a change of one file is refused, or is a torn tail of a journal's last blocks,
    /// which is counted: no wrong value, nothing lost without a word.
    pub fn assert_noticed(&self, path: &Path, bytes: &[u8], what: &str) {
        let length = bytes.len();
        let own = &self
            .files
            .iter()
            .find(|(own, _)| own == path)
            .expect("ours")
            .1;
        let same = own
            .iter()
            .zip(bytes)
            .take_while(|(own, new)| own == new)
            .count();
        match self.with(&[(path, bytes.to_vec())]) {
            (Verdict::Refused(error), whole) => {
                assert!(
                    matches!(error, Error::CorruptCache { .. }),
                    "{what}: {error:?}"
                );
                assert!(error.to_string().contains(FOLDER), "{what}: {error}");
                assert!(!whole, "{what}: verified");
            }
            (Verdict::Read { lost, torn }, _) => {
                assert!(
                    path.to_string_lossy().ends_with(".journal"),
                    "{what} was not noticed"
                );
                let ends = Self::blocks(own);
                // The header and blocks that are as they were.
                let whole = ends.iter().filter(|&&end| end <= same).count();
                let end = ends[whole.max(1) - 1].min(length);
                let end = if whole == 0 { 0 } else { end };
                let header = |at: usize| (own.get(at..at + 64), bytes.get(at..at + 64));
                let is_lost = |&at: &usize| header(at).0 != header(at).1;
                let later = &ends[whole.max(1)..BLOCKS.max(whole)];
                assert!(later.iter().all(is_lost), "{what}: a later block was whole");
                assert_eq!(torn, (length - end) as u64, "{what}");
                assert_eq!(lost, (BLOCKS + 1 - whole.max(1)) * RECORDS, "{what}");
            }
        }
    }
}

pub fn cache(disk: &SimDisk, kind: ValueKind) -> Cache {
    let cache = Cache::new(FOLDER, FINGERPRINT).with_kind(kind);
    cache.on(Arc::new(disk.clone()))
}

/// Reads everything: what is there must be right.
pub fn verdict(opened: Result<CacheReader>) -> Verdict {
    let read = || {
        let reader = opened?;
        let all: Vec<usize> = (0..ALL).collect();
        let keys: Vec<Key> = all.iter().copied().map(key).collect();
        let rows = reader.join(&keys)?;
        let (found, rows): (Vec<usize>, Vec<i64>) =
            all.iter().zip(rows).filter(|(_, row)| *row >= 0).unzip();
        reader.read_sums(&rows)?;
        assert_values(&reader, &found, &rows);
        let distinct = reader.distinct()? as usize;
        assert_eq!(distinct, found.len(), "a key that nobody wrote");
        Ok((ALL - found.len(), reader.torn_bytes()))
    };
    match read() {
        Ok((lost, torn)) => Verdict::Read { lost, torn },
        Err(error) => Verdict::Refused(error),
    }
}
