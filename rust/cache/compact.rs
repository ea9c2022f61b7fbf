//! Many files become few; leftovers go.

use std::{collections::BTreeSet, io::ErrorKind, path::Path};

use super::{
    Cache, ReadMode,
    disk::DiskFile,
    journal_table::JournalTable,
    seal::{Counts, SHARD_BYTES},
    shard_writer::Written,
    snapshot::{Listing, open_shard, open_sources, read_manifests},
    source::Source,
    writer::host,
};
use crate::{Error, Result};

/// What `compact` or `merge` did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Completions in the shards that were written.
    pub completions: u64,
    /// Records left out because another of their key was taken.
    pub repeats: u64,
    /// Shards written now.
    pub shards: Vec<String>,
    /// Files that are gone: shards and journals whose records are in the new shards, leftovers.
    pub removed: Vec<String>,
    /// Journals left alone: their writer lives, or may live on another host.
    pub in_use: Vec<String>,
}

/// A journal, and the lock that says that nobody writes it.
type Idle = (JournalTable, Box<dyn DiskFile>);

impl Cache {
    /// Rewrites all shards and idle journals as shards of about a gigabyte, each key once, and
    /// removes what is in them and what dead writers left.
    ///
    /// Journals of other hosts are left alone unless `other_hosts` says that nobody writes there:
    /// some network file systems do not show a lock to other hosts.
    pub fn compact(&self, other_hosts: bool) -> Result<Compacted> {
        let listing = Listing::stable(self)?;
        let manifests = read_manifests(self, &listing)?;
        let mut sources = Vec::new();
        for manifest in manifests.values() {
            let shard = open_shard(self, manifest, &listing, ReadMode::default())?;
            sources.push(Source::Shard(shard));
        }
        let mut done = self.rewrite(sources, &listing, other_hosts)?;
        self.remove_leftovers(&listing, other_hosts, &mut done)?;
        Ok(done)
    }

    /// Turns idle journals into shards and leaves the shards that are there alone: what the end of
    /// a pass does for those whose writers died.
    pub fn seal_idle(&self, other_hosts: bool) -> Result<Compacted> {
        self.rewrite(Vec::new(), &Listing::stable(self)?, other_hosts)
    }

    /// Writes these shards and all idle journals anew, and removes what was written.
    fn rewrite(
        &self,
        mut sources: Vec<Source>,
        listing: &Listing,
        other_hosts: bool,
    ) -> Result<Compacted> {
        let mut done = Compacted::default();
        let mut locks = Vec::new(); // until the journals are gone
        for name in &listing.journals {
            match self.idle_journal(name, other_hosts)? {
                None => done.in_use.push(name.clone()),
                Some((table, lock)) => {
                    sources.push(Source::Journal(table));
                    locks.push(lock);
                }
            }
        }
        if sources.len() > 1 || !locks.is_empty() {
            let (written, counts) = self.write_shards(&sources, SHARD_BYTES, |_| true)?;
            self.publish(&written)?;
            done.note(&written, counts);
            self.remove_sources(&sources, &mut done)?;
        }
        Ok(done)
    }

    /// Adds the records of `others`, of the same reference, that this cache lacks. They stay where
    /// they are.
    pub fn merge(&self, others: &[Self]) -> Result<Compacted> {
        let made = self.disk.create_folder(&self.folder);
        made.map_err(Error::io(&self.folder))?;
        let mut sources = open_sources(self, ReadMode::default())?;
        let own = sources.len();
        for other in others {
            sources.extend(open_sources(other, ReadMode::default())?);
        }
        let new = |found: &super::merge::Found| found.source >= own;
        let (written, counts) = self.write_shards(&sources, SHARD_BYTES, new)?;
        self.publish(&written)?;
        let mut done = Compacted::default();
        done.note(&written, counts);
        Ok(done)
    }

    /// Locks a journal that nobody writes.
    fn idle_journal(&self, name: &str, other_hosts: bool) -> Result<Option<Idle>> {
        let path = self.path(name);
        let opened = match self.disk.open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(Error::io(&path))?,
        };
        if !is_idle(name, &*opened, other_hosts) {
            return Ok(None);
        }
        let table = JournalTable::open(self, path)?;
        Ok(Some((table, opened)))
    }

    /// Removes what the new shards hold. A shard's manifest goes first and for good, so that none
    /// ever names a shard that is gone.
    fn remove_sources(&self, sources: &[Source], done: &mut Compacted) -> Result<()> {
        let kept: BTreeSet<String> = done.shards.iter().cloned().collect();
        let gone = || {
            sources
                .iter()
                .filter(|source| !kept.contains(source.name()))
        };
        for source in gone().filter(|source| matches!(source, Source::Shard(_))) {
            let stem = source.name().split('.').next().unwrap_or_default();
            self.remove(&format!("{stem}.{}", super::manifest::EXTENSION))?;
        }
        self.sync_names()?;
        for source in gone() {
            self.remove(source.name())?;
            done.removed.push(source.name().into());
        }
        Ok(())
    }

    /// Removes what writers and sealers that died left behind.
    fn remove_leftovers(
        &self,
        before: &Listing,
        other_hosts: bool,
        done: &mut Compacted,
    ) -> Result<()> {
        let now = Listing::stable(self)?;
        let unlisted = |name: &&String| {
            let stem = name.split('.').next().unwrap_or_default();
            !now.manifests
                .contains(&format!("{stem}.{}", super::manifest::EXTENSION))
        };
        let shards = before.shards.intersection(&now.shards).filter(unlisted);
        let partials = before.partials.intersection(&now.partials);
        for name in shards.chain(partials) {
            let path = self.path(name);
            let Ok(file) = self.disk.open(&path) else {
                continue;
            };
            // A shard's name does not tell its host.
            let of_here = is_idle(name, &*file, other_hosts || !name.contains('-'));
            if of_here && !self.is_listed_now(name) {
                self.remove(name)?;
                done.removed.push(name.clone());
            }
        }
        self.sync_names()
    }

    fn is_listed_now(&self, name: &str) -> bool {
        let stem = name.split('.').next().unwrap_or_default();
        let manifest = self.path(&format!("{stem}.{}", super::manifest::EXTENSION));
        self.disk.open(&manifest).is_ok()
    }

    fn sync_names(&self) -> Result<()> {
        self.disk
            .sync_folder(&self.folder)
            .map_err(Error::io(&self.folder))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        match self.disk.remove(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(Error::io(&path)),
        }
    }
}

impl Compacted {
    fn note(&mut self, written: &[Written], counts: Counts) {
        self.completions = counts.written;
        self.repeats = counts.repeats;
        self.shards = written.iter().map(|shard| shard.name.clone()).collect();
    }
}

/// Whether nobody writes this file: it is of this host (or that does not matter), and its lock is
/// free.
fn is_idle(name: &str, file: &dyn DiskFile, other_hosts: bool) -> bool {
    let of_here = Path::new(name)
        .file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with(&format!("{}-", host())));
    (of_here || other_hosts) && matches!(file.lock(), Ok(true))
}
