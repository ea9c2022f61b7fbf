//! Journals become shards, many files become few, and leftovers are removed.
//!
//! The order of events is the one invariant: a shard is durable under its name before its manifest is
//! written, and the manifest is durable before any file is removed whose records are in the shard. So at every
//! moment each record is in a journal or in a listed shard.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, ErrorKind},
    path::Path,
    thread,
};

use super::{
    disk::{DiskFile, ReadMode},
    folder::{Cache, NAMES, host, manifest_name},
    journal::JournalTable,
    listing::{
        Listing, Manifest, PAUSE, TRIES, is_gone, open_shard, open_sources, read_manifests,
        with_stable_listing,
    },
    shard_writer::{ShardWriter, Written},
    source::{Merged, MergedKey, Source},
};
use crate::{Error, Result};

/// A shard of this many bytes is full.
const SHARD_BYTES: usize = 1 << 30;

/// How much was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Completions in the new shards.
    pub written: u64,
    /// Records left out because another of their key was taken.
    pub repeats: u64,
}

/// What `compact` or `merge` did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Completions in the shards that were written.
    pub completions: u64,
    /// Records left out because another of their key was taken.
    pub repeats: u64,
    /// Shards written now.
    pub shards: Vec<String>,
    /// Files that were removed: leftovers, and those whose records are in the new shards.
    pub removed: Vec<String>,
    /// Journals left alone: their writer lives, or may live on another host.
    pub in_use: Vec<String>,
}

/// The listing of a folder, its sources without a writer, and the names of journals in use.
type Idle = (Listing, Vec<Source>, Compacted);

impl Cache {
    /// Rewrites all shards and idle journals as shards of about a gigabyte, each key once, and
    /// removes what is in them and what dead writers left.
    ///
    /// Journals of other hosts are left alone unless `other_hosts` promises that no writer lives there:
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

    /// Rewrites all idle journals, and the shards if asked, as new shards; removes the old files.
    fn rewrite(&self, shards: bool, other_hosts: bool) -> Result<(Listing, Compacted)> {
        let idle = |listing: &Listing| self.idle_sources(listing, shards, other_hosts);
        let (listing, sources, mut done) = with_stable_listing(self, idle)?;
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
        let new = |found: &MergedKey| found.source >= sealed && found.last >= own;
        let (written, counts) = self.add_shards(&sources, new)?;
        let mut done = Compacted::default();
        done.note(&written, counts);
        Ok(done)
    }

    fn is_alike(&self, other: &Self) -> bool {
        (self.fingerprint, self.kind) == (other.fingerprint, other.kind)
    }

    /// Everything without a writer; shards only if asked.
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

    /// Opens and locks a journal without a writer: the table holds the lock.
    fn idle_journal(&self, name: &str, other_hosts: bool) -> Result<Option<JournalTable>> {
        let path = self.path(name);
        let opened = self.disk.open(&path).map_err(Error::io(&path))?;
        if !is_idle(name, &*opened, other_hosts) {
            return Ok(None);
        }
        JournalTable::of(self, path, opened).map(Some)
    }

    /// Removes files whose records are in the new shards. A shard's manifest is removed first and
    /// durably, so that no manifest ever names a missing shard.
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
                // Another process that sealed the same bytes may have listed them again meanwhile.
                self.remove(&manifest_name(source.name()))?;
            }
            done.removed.push(source.name().into());
        }
        Ok(())
    }

    /// Removes files that writers and sealers left when they died.
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
            // The name of a shard does not contain its host.
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

/// Whether this file has no writer: its lock is free, and it is from this host (or `other_hosts`).
fn is_idle(name: &str, file: &dyn DiskFile, other_hosts: bool) -> bool {
    let of_here = name.starts_with(&format!("{}-", host()));
    (of_here || other_hosts) && matches!(file.lock(), Ok(true))
}

impl Cache {
    /// Turns a journal without a writer into shards; returns the name of the first.
    ///
    /// At every moment each record is in the journal or in a listed shard.
    pub(super) fn seal(&self, journal: &Path) -> Result<Option<String>> {
        let table = JournalTable::open(self, journal.into())?;
        let sources = [Source::Journal(table)];
        let (shards, _) = self.add_shards(&sources, |_| true)?;
        let first = shards.first().map(|written| written.name.clone());
        self.disk.remove(journal).map_err(Error::io(journal))?;
        Ok(first)
    }

    /// Writes the wanted keys of `sources` to shards that are part of the cache when this returns.
    ///
    /// Another process that compacts may take a file for a leftover before it is locked, or merge a
    /// new shard and remove it before [`Self::check_kept`]. Then all are written once more:
    /// `sources` are still open, and a later compaction removes repeats.
    fn add_shards(
        &self,
        sources: &[Source],
        wanted: impl Fn(&MergedKey) -> bool,
    ) -> Result<(Vec<Written>, Counts)> {
        let add = || {
            let (shards, counts) = self.write_shards(sources, &wanted)?;
            self.publish(&shards).map(|()| (shards, counts))
        };
        for _ in 1..TRIES {
            match add() {
                Err(error) if is_gone(&error) => thread::sleep(PAUSE),
                added => return added,
            }
        }
        add()
    }

    /// Writes the wanted keys of `sources`, each once, to shards of about `SHARD_BYTES`.
    fn write_shards(
        &self,
        sources: &[Source],
        wanted: impl Fn(&MergedKey) -> bool,
    ) -> Result<(Vec<Written>, Counts)> {
        let mut merged = Merged::new(self.agreement(), sources, None)?;
        let (mut shards, mut counts) = (Vec::new(), Counts::default());
        let mut open: Option<ShardWriter<'_>> = None;
        while let Some(found) = merged.next()? {
            counts.repeats += found.repeats;
            if !wanted(&found) {
                continue;
            }
            counts.written += 1;
            let mut writer = match open.take() {
                Some(writer) => writer,
                None => ShardWriter::new(self)?,
            };
            writer.push(&sources[found.source], found.row)?;
            if writer.bytes() < SHARD_BYTES {
                open = Some(writer);
            } else {
                shards.push(writer.finish()?);
            }
        }
        if let Some(writer) = open {
            shards.push(writer.finish()?);
        }
        Ok((shards, counts))
    }

    /// Makes shards part of the cache: when this returns, their manifests are durable and the
    /// records may go from where they were.
    fn publish(&self, shards: &[Written]) -> Result<()> {
        for written in shards {
            self.write_manifest(&Manifest::new(self, written))?;
        }
        let folder = self.folder();
        let synced = self.disk.sync_folder(folder);
        synced.map_err(Error::write(folder, NAMES))?;
        shards
            .iter()
            .try_for_each(|written| self.check_kept(written))
    }

    /// Another process that compacts may have removed the shard, as a leftover before it was listed
    /// or because another shard has its records: then its manifest must go too.
    fn check_kept(&self, written: &Written) -> Result<()> {
        let path = self.path(&written.name);
        let opened = self.disk.open(&path).map(drop);
        if opened.as_ref().is_err_and(is_not_found) {
            let _ = self.disk.remove(&self.path(&manifest_name(&written.name)));
        }
        opened.map_err(Error::io(&path))
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<()> {
        let partial = self.new_partial();
        let (path, bytes) = (self.path(&manifest.name()), manifest.encode());
        let write = || {
            let file = self.disk.create(&partial)?;
            let _ = file.lock(); // as shards do
            file.append(&bytes)?;
            file.sync()?;
            self.disk.rename(&partial, &path)
        };
        let written = write();
        if written.is_err() {
            let _ = self.disk.remove(&partial); // `compact` tries again
        }
        written.map_err(Error::write(&path, bytes.len()))
    }
}

fn is_not_found(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound
}
