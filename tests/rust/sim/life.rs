//! Two caches of one reference on one disk, what is done to them, and what they must hold.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use logratio::{
    Error, Result,
    cache::{Cache, CacheWriter, ReadMode, ValueKind},
};

use super::{
    SimDisk,
    chance::Chance,
    records::{append, assert_values, keys},
};

pub const FOLDERS: [&str; 2] = ["/cache/here", "/cache/there"];
/// What happens to the caches, in an order that chance decides.
#[derive(Debug)]
pub struct Life {
    pub disk: SimDisk,
    pub chance: Chance,
    kind: ValueKind,
    writers: Vec<(usize, CacheWriter)>,
    /// Records of each cache in the order of their acknowledgement.
    acknowledged: [Vec<usize>; 2],
    /// Records that somebody tried to write.
    tried: usize,
}

impl Life {
    pub fn new(disk: SimDisk, seed: u64) -> Self {
        let kind = if seed % 3 == 2 {
            ValueKind::Sums
        } else {
            ValueKind::PerToken
        };
        Self {
            disk,
            chance: Chance(seed),
            kind,
            writers: Vec::new(),
            acknowledged: [Vec::new(), Vec::new()],
            tried: 0,
        }
    }

    /// Goes on upon another disk, where so many records are acknowledged.
    pub fn resume(&self, disk: SimDisk, acknowledged: [usize; 2], seed: u64) -> Self {
        let known = |cache: usize| self.acknowledged[cache][..acknowledged[cache]].to_vec();
        Self {
            disk,
            chance: Chance(seed),
            kind: self.kind,
            writers: Vec::new(),
            acknowledged: [known(0), known(1)],
            tried: self.tried,
        }
    }

    pub fn cache(&self, cache: usize) -> Cache {
        let cache = Cache::new(FOLDERS[cache], [7; 32]).with_kind(self.kind);
        cache.on(Arc::new(self.disk.clone()))
    }

    /// So many steps; the first error ends them.
    pub fn steps(&mut self, steps: usize) -> Result<()> {
        (0..steps).try_for_each(|_| self.step())
    }

    pub fn step(&mut self) -> Result<()> {
        match self.chance.below(20) {
            _ if self.writers.is_empty() => self.start_writer(),
            0 | 1 if self.writers.len() < 4 => self.start_writer(),
            2 => {
                let at = self.chance.below(self.writers.len());
                drop(self.writers.swap_remove(at));
                Ok(())
            }
            3 | 4 => {
                let at = self.chance.below(self.writers.len());
                self.writers.swap_remove(at).1.seal().map(drop)
            }
            5 => {
                let cache = self.chance.below(2);
                self.compact(cache)
            }
            6 => self.merge(),
            _ => self.append(),
        }
    }

    pub fn start_writer(&mut self) -> Result<()> {
        let cache = usize::from(self.chance.below(4) == 0);
        self.writers.push((cache, self.cache(cache).writer()?));
        Ok(())
    }

    /// One block, of new records or (one in five) of ones that somebody tried before.
    pub fn append(&mut self) -> Result<()> {
        let records = [1, 1, 1, 2, 2, 3, 6, 16][self.chance.below(8)];
        let again = self.tried > records && self.chance.below(5) == 0;
        let first = if again {
            self.chance.below(self.tried - records)
        } else {
            self.tried
        };
        let numbers: Vec<usize> = (first..first + records).collect();
        self.tried = self.tried.max(first + records);
        let at = self.chance.below(self.writers.len());
        let (cache, writer) = &mut self.writers[at];
        if let Err(error) = append(writer, self.kind, &numbers) {
            let again =
                append(writer, self.kind, &numbers).expect_err("nobody knows what is there");
            assert!(matches!(again, Error::Closed { .. }), "{again:?}");
            self.writers.swap_remove(at);
            return Err(error);
        }
        let cache = *cache;
        self.acknowledge(cache, numbers);
        Ok(())
    }

    pub fn compact(&mut self, cache: usize) -> Result<()> {
        let folder = self.cache(cache).folder().to_owned();
        let compacted = self.cache(cache).compact(false);
        match compacted {
            // A cache begins with its first writer.
            Err(Error::Io { path, .. })
                if path == folder && self.acknowledged[cache].is_empty() =>
            {
                Ok(())
            }
            compacted => compacted.map(drop),
        }
    }

    /// Everything from there comes here too.
    pub fn merge(&mut self) -> Result<()> {
        if self.acknowledged[1].is_empty() {
            return Ok(());
        }
        self.cache(0).merge(&[self.cache(1)])?;
        self.acknowledge(0, self.acknowledged[1].clone());
        Ok(())
    }

    fn acknowledge(&mut self, cache: usize, numbers: Vec<usize>) {
        self.acknowledged[cache].extend(numbers);
        self.disk.acknowledge(cache, self.acknowledged[cache].len());
    }

    pub fn drop_writers(&mut self) {
        self.writers.clear();
    }

    pub fn writers(&mut self) -> &mut Vec<(usize, CacheWriter)> {
        &mut self.writers
    }

    /// Both caches, as another disk has them, hold what was acknowledged when that was this one,
    /// with its values, and nothing that nobody wrote.
    pub fn check(&self, disk: &SimDisk, acknowledged: [usize; 2]) {
        for (cache, count) in acknowledged.into_iter().enumerate() {
            let known = &self.acknowledged[cache][..count];
            let reader = match self
                .cache(cache)
                .on(Arc::new(disk.clone()))
                .open(ReadMode::Pread)
            {
                Err(Error::Io { .. }) if known.is_empty() => continue,
                opened => opened.expect("opens after a loss of power"),
            };
            let rows = reader.join(&keys()[..self.tried]).expect("joins");
            for &number in known {
                assert!(
                    rows[number] >= 0,
                    "record {number} of cache {cache} is lost"
                );
            }
            let (found, rows): (Vec<usize>, Vec<i64>) = (0..self.tried)
                .zip(rows)
                .filter(|(_, row)| *row >= 0)
                .unzip();
            assert_values(&reader, &found, &rows);
        }
    }

    /// Both caches hold what was acknowledged, and no key that nobody wrote.
    pub fn check_all(&self) {
        self.check(&self.disk, self.counts());
        for cache in (0..2).filter(|&cache| !self.acknowledged[cache].is_empty()) {
            let reader = self.cache(cache).open(ReadMode::Pread).expect("just now");
            let rows = reader.join(&keys()[..self.tried]).expect("joins");
            let found = rows.iter().filter(|row| **row >= 0).count();
            assert_eq!(reader.distinct().expect("no contradiction"), found as u64);
        }
    }

    pub fn counts(&self) -> [usize; 2] {
        [0, 1].map(|cache| self.acknowledged[cache].len())
    }

    /// Writes on, seals, merges, compacts: nothing of the loss of power is left behind.
    pub fn recover(&mut self) {
        self.start_writer().expect("a new writer");
        self.append().expect("appends");
        let (_, writer) = self.writers.pop().expect("just now");
        if self.chance.flip() {
            writer.seal().expect("seals");
        } else {
            drop(writer);
        }
        self.merge().expect("merges");
        for cache in 0..2 {
            self.compact(cache).expect("compacts");
        }
    }

    /// After compaction without a living writer there is one shard with its manifest and no more.
    pub fn check_tidy(&self) {
        for (cache, folder) in FOLDERS.into_iter().enumerate() {
            let files = self.disk.files(folder.as_ref());
            let mut endings: BTreeMap<String, usize> = BTreeMap::new();
            for (path, _) in &files {
                let name = path.file_name().expect("a name").to_string_lossy();
                *endings
                    .entry(name.split_once('.').expect("an ending").1.into())
                    .or_default() += 1;
            }
            let one = |ending: &str| endings.remove(ending).unwrap_or(0);
            let mut one = one;
            let (shards, manifests) = (one("arrow"), one("manifest.json"));
            assert_eq!(shards, manifests);
            assert!(
                shards <= 1 && endings.is_empty(),
                "left behind: {:?}",
                names(&files)
            );
            let verified = self.cache(cache).verify();
            if shards == 1 {
                let report = verified.expect("verifies");
                assert!(
                    report.is_whole() && report.leftovers.is_empty(),
                    "{report:?}"
                );
            }
        }
    }
}

fn names(files: &[(PathBuf, Vec<u8>)]) -> Vec<&Path> {
    files.iter().map(|(path, _)| path.as_path()).collect()
}
