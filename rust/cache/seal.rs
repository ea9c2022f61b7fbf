//! Records become sealed shards, and shards become part of the cache by their manifests.

use std::{
    hash::{BuildHasher, RandomState},
    io::{self, ErrorKind},
    path::Path,
    process, thread,
};

use super::{
    Cache,
    journal_table::JournalTable,
    manifest::{Manifest, manifest_name},
    merge::{Found, Merged},
    shard_writer::{ShardWriter, Written},
    snapshot::{PARTIAL, PAUSE, TRIES, is_gone},
    source::Source,
    writer::writer_name,
};
use crate::{Error, Result};

/// A shard of this many bytes is full.
pub const SHARD_BYTES: usize = 1 << 30;

/// What a folder grows by for new names.
pub const NAMES: usize = 4096;

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Completions in the new shards.
    pub written: u64,
    /// Records left out because another of their key was taken.
    pub repeats: u64,
}

impl Cache {
    /// Turns a journal, which nobody writes any more, into shards; returns the name of the first.
    ///
    /// Whatever happens, every record is in a journal or in a listed shard.
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
    /// Whoever compacts may take a file for a leftover before it is locked, or take a new shard in
    /// and remove it before it is seen to be kept. Then all are written once more: `sources` are
    /// open, and compaction leaves out what is there twice.
    pub(super) fn add_shards(
        &self,
        sources: &[Source],
        wanted: impl Fn(&Found) -> bool,
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
        wanted: impl Fn(&Found) -> bool,
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

    /// Somebody who tidied up may have taken an unlisted shard for a leftover, or have removed one
    /// of the same bytes because its records were somewhere else: no manifest may name it then.
    fn check_kept(&self, written: &Written) -> Result<()> {
        let path = self.path(&written.name);
        let opened = self.disk.open(&path).map(drop);
        if opened.as_ref().is_err_and(is_not_found) {
            let _ = self.disk.remove(&self.path(&manifest_name(&written.name)));
        }
        opened.map_err(Error::io(&path))
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<()> {
        let id = RandomState::new().hash_one(process::id());
        let partial = self.path(&format!("{}.{PARTIAL}", writer_name(id)));
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
