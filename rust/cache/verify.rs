//! `inspect` and `verify`: what a folder holds, and whether it is damaged.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::{
    disk::ReadMode,
    folder::{Cache, ValueKind, manifest_name},
    journal::JournalTable,
    listing::{Listing, Manifest, is_gone, open_shard, read_manifest, with_stable_listing},
    source::{self, Source},
};
use crate::{Error, Result, content_key::Key, file_format::Hex};

/// Bytes hashed at a time.
const CHUNK: usize = 1 << 20;

/// One file of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Whether it is a sealed shard; a journal otherwise.
    pub sealed: bool,
    /// Whether a writer holds it.
    pub in_use: bool,
    /// Completions in it.
    pub rows: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Its length.
    pub bytes: u64,
    /// Bytes after the last whole block of a journal.
    pub torn: u64,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// What a folder holds, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Shards, then journals.
    pub parts: Vec<Part>,
    /// Files that are not part of the cache, left by writers that died.
    pub leftovers: Vec<String>,
    /// Different keys in all readable parts; `None` where records contradict each other.
    pub distinct: Option<u64>,
    /// Problems that no single file has.
    pub problems: Vec<String>,
}

impl Cache {
    /// Reports what the folder holds, after checking the seals of shards and every byte of journals.
    pub fn inspect(&self) -> Result<Report> {
        self.examine(false)
    }

    /// Compares every byte with its checksum, files with their SHA-256, the order of keys, values,
    /// and all records of one key with each other.
    pub fn verify(&self) -> Result<Report> {
        self.examine(true)
    }

    /// Examines every file. If one is removed meanwhile, that is no damage: the listing is made again.
    fn examine(&self, all: bool) -> Result<Report> {
        with_stable_listing(self, |listing| self.examine_listed(listing, all))
    }

    fn examine_listed(&self, listing: &Listing, all: bool) -> Result<Report> {
        let mut report = Report::default();
        let mut whole = Vec::new();
        for name in &listing.manifests {
            match self.examine_shard(name, listing, all) {
                Ok(shard) => whole.push(shard),
                Err(error) => report.refuse(name, true, error)?,
            }
        }
        for name in &listing.journals {
            match JournalTable::open(self, self.path(name)) {
                Ok(table) => whole.push(Source::Journal(table)),
                Err(error) => report.refuse(name, false, error)?,
            }
        }
        report
            .parts
            .extend(whole.iter().map(|source| self.part(source)));
        report.parts.sort_by_key(|part| !part.sealed);
        report.leftovers = leftovers(listing);
        match source::count_keys(self.agreement(), &whole) {
            Ok(keys) => report.distinct = Some(keys),
            Err(error) => report.problems.push(error.to_string()),
        }
        Ok(report)
    }

    fn examine_shard(&self, name: &str, listing: &Listing, all: bool) -> Result<Source> {
        let manifest = read_manifest(self, &self.path(name))?;
        let shard = open_shard(self, &manifest, listing, ReadMode::default())?;
        if all {
            shard.check_blocks()?;
            self.check_hash(&manifest)?;
        }
        let shard = Source::Shard(shard);
        if all {
            check_rows(self.kind, &shard, &manifest)?;
        }
        Ok(shard)
    }

    fn check_hash(&self, manifest: &Manifest) -> Result<()> {
        let path = self.path(&manifest.shard);
        let found = self.sha256(&path)?;
        if found == manifest.sha256 {
            return Ok(());
        }
        let wanted = &manifest.sha256;
        Err(Error::cache(
            &path,
            format!("its SHA-256 is {found}, and {wanted} was written"),
        ))
    }

    fn sha256(&self, path: &Path) -> Result<String> {
        let hash = || {
            let file = self.disk.open(path)?;
            let (mut at, length) = (0, file.length()?);
            let mut hash = Sha256::new();
            let mut chunk = vec![0; CHUNK];
            while at < length {
                let chunk = &mut chunk[..CHUNK.min((length - at) as usize)];
                file.read_at(chunk, at)?;
                hash.update(&*chunk);
                at += chunk.len() as u64;
            }
            Ok(Hex(&hash.finalize()).to_string())
        };
        hash().map_err(Error::io(path))
    }

    fn part(&self, source: &Source) -> Part {
        let is_free = || {
            let file = self.disk.open(source.path());
            file.and_then(|file| file.lock()).unwrap_or(true)
        };
        let sealed = !source.is_journal();
        Part {
            name: source.name().into(),
            sealed,
            in_use: !sealed && !is_free(),
            rows: source.rows(),
            tokens: source.all_tokens(),
            bytes: source.length(),
            torn: source.torn(),
            problem: None,
        }
    }
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.problems.is_empty() && self.parts.iter().all(|part| part.problem.is_none())
    }

    fn refuse(&mut self, name: &str, sealed: bool, error: Error) -> Result<()> {
        if is_gone(&error) {
            return Err(error);
        }
        self.parts.push(Part {
            name: name.into(),
            sealed,
            in_use: false,
            rows: 0,
            tokens: 0,
            bytes: 0,
            torn: 0,
            problem: Some(error.to_string()),
        });
        Ok(())
    }
}

/// The order of a shard's keys, and every value.
fn check_rows(kind: ValueKind, shard: &Source, manifest: &Manifest) -> Result<()> {
    let refuse = |reason: String| Error::cache(shard.path(), reason);
    let (mut before, mut tokens) = (None::<Key>, 0);
    let mut bytes: Vec<u8> = Vec::new();
    for row in 0..shard.rows() {
        let key = shard.key(row)?;
        if before.is_some_and(|before| before >= key) {
            return Err(refuse(format!("its keys do not ascend at row {row}")));
        }
        before = Some(key);
        bytes.clear();
        tokens += u64::from(shard.values(kind, row, &mut bytes)?);
    }
    if tokens == manifest.tokens && tokens == shard.all_tokens() {
        return Ok(());
    }
    Err(refuse(format!(
        "it holds {tokens} tokens, not {}",
        manifest.tokens
    )))
}

fn leftovers(listing: &Listing) -> Vec<String> {
    let unlisted = |name: &&String| !listing.manifests.contains(&manifest_name(name));
    let shards = listing.shards.iter().filter(unlisted);
    shards.chain(&listing.partials).cloned().collect()
}
