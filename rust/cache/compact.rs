//! Many files become few; leftovers go.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
};

use super::{
    Cache, ReadMode,
    disk::DiskFile,
    journal_table::JournalTable,
    manifest::manifest_name,
    merge::Found,
    seal::{Counts, NAMES},
    shard_writer::Written,
    snapshot::{Listing, open_shard, open_sources, read_manifests, until_still},
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

/// What a folder had, the sources that nobody writes, and the names of those that somebody does.
type Idle = (Listing, Vec<Source>, Compacted);

impl Cache {
    /// Rewrites all shards and idle journals as shards of about a gigabyte, each key once, and
    /// removes what is in them and what dead writers left.
    ///
    /// Journals of other hosts are left alone unless `other_hosts` says that nobody writes there:
    /// some network file systems do not show a lock to other hosts.
    pub fn compact(&self, other_hosts: bool) -> Result<Compacted> {
        let (listing, mut done) = self.rewrite(true, other_hosts)?;
        self.remove_leftovers(&listing, other_hosts, &mut done)?;
        Ok(done)
    }

    /// Turns idle journals into shards and leaves the shards that are there alone: what the end of
    /// a pass does for those whose writers died.
    pub fn seal_idle(&self, other_hosts: bool) -> Result<Compacted> {
        self.rewrite(false, other_hosts).map(|(_, done)| done)
    }

    /// Writes all idle journals, and the shards if asked, anew; removes what was written.
    fn rewrite(&self, shards: bool, other_hosts: bool) -> Result<(Listing, Compacted)> {
        let idle = |listing: &Listing| self.idle_sources(listing, shards, other_hosts);
        let (listing, sources, mut done) = until_still(self, idle)?;
        let all_sealed = !sources.iter().any(Source::is_journal);
        if sources.len() > 1 || !all_sealed {
            let (written, counts) = self.add_shards(&sources, |_| true)?;
            done.note(&written, counts);
            self.remove_sources(&sources, &mut done)?;
        }
        Ok((listing, done))
    }

    /// Adds the records of `others`, of the same reference, that no shard of this cache has. They
    /// stay where they are.
    pub fn merge(&self, others: &[Self]) -> Result<Compacted> {
        if let Some(other) = others.iter().find(|other| !self.is_alike(other)) {
            let folder = other.folder.display();
            let reason = format!("{folder} keeps values of another reference or kind");
            return Err(Error::Invalid(reason));
        }
        let made = self.disk.create_folder(&self.folder);
        made.map_err(Error::write(&self.folder, NAMES))?;
        let mut sources = open_sources(self, ReadMode::default())?;
        let own = sources.len();
        let sealed = sources.iter().filter(|source| !source.is_journal()).count();
        self.sync_names()?;
        for other in others {
            sources.extend(open_sources(other, ReadMode::default())?);
        }
        // A journal's last block can be read before it is durable, and may never be.
        let new = |found: &Found| found.source >= sealed && found.last >= own;
        let (written, counts) = self.add_shards(&sources, new)?;
        let mut done = Compacted::default();
        done.note(&written, counts);
        Ok(done)
    }

    fn is_alike(&self, other: &Self) -> bool {
        (self.fingerprint, self.kind) == (other.fingerprint, other.kind)
    }

    /// Everything that nobody writes; the shards only if asked.
    fn idle_sources(&self, listing: &Listing, shards: bool, other_hosts: bool) -> Result<Idle> {
        let mut sources = Vec::new();
        let manifests = if shards {
            read_manifests(self, listing)?
        } else {
            BTreeMap::new()
        };
        for manifest in manifests.values() {
            let shard = open_shard(self, manifest, listing, ReadMode::default())?;
            sources.push(Source::Shard(shard));
        }
        let mut done = Compacted::default();
        for name in &listing.journals {
            match self.idle_journal(name, other_hosts)? {
                None => done.in_use.push(name.clone()),
                Some(table) => sources.push(Source::Journal(table)),
            }
        }
        Ok((listing.clone(), sources, done))
    }

    /// Locks a journal that nobody writes: the table holds the lock.
    fn idle_journal(&self, name: &str, other_hosts: bool) -> Result<Option<JournalTable>> {
        let path = self.path(name);
        let opened = self.disk.open(&path).map_err(Error::io(&path))?;
        if !is_idle(name, &*opened, other_hosts) {
            return Ok(None);
        }
        JournalTable::of(self, path, opened).map(Some)
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
        for source in gone().filter(|source| !source.is_journal()) {
            self.remove(&manifest_name(source.name()))?;
        }
        self.sync_names()?;
        for source in gone() {
            self.remove(source.name())?;
            if !source.is_journal() {
                // Another sealer of the same bytes may have listed them again meanwhile.
                self.remove(&manifest_name(source.name()))?;
            }
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
        let unlisted = |name: &&String| !now.manifests.contains(&manifest_name(name));
        let shards = before.shards.intersection(&now.shards).filter(unlisted);
        let partials = before.partials.intersection(&now.partials);
        for name in shards.chain(partials) {
            let path = self.path(name);
            let Ok(file) = self.disk.open(&path) else {
                continue;
            };
            // A shard's name does not tell its host.
            let idle = is_idle(name, &*file, other_hosts || !name.contains('-'));
            if idle && !self.is_listed_now(name) {
                self.remove(name)?;
                done.removed.push(name.clone());
            }
        }
        self.sync_names()
    }

    fn is_listed_now(&self, name: &str) -> bool {
        self.disk.open(&self.path(&manifest_name(name))).is_ok()
    }

    fn sync_names(&self) -> Result<()> {
        self.disk
            .sync_folder(&self.folder)
            .map_err(Error::write(&self.folder, NAMES))
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
    let of_here = name.starts_with(&format!("{}-", host()));
    (of_here || other_hosts) && matches!(file.lock(), Ok(true))
}
