//! Streams groups to columns and seals them.

use std::{fs::File, io, path::Path};

use super::{
    Store,
    bulk::Bulk,
    columns::{Column, Counts},
    duplicates::{Duplicates, GroupKey, Outcome},
    format::HEADER,
    sealing::seal,
    spool::{Sink, Spool},
    target::{REPEATS, Target},
    threads::in_parallel,
};
use crate::{Error, Result, error, group::Group};

/// Groups that one thread hashes at least.
pub(super) const HASHED_TOGETHER: usize = 512;

/// Collects groups and seals them as a [`Store`].
///
/// With a path, columns are files in the folder `<path>.partial`, so memory stays bounded;
/// [`StoreWriter::finish`] joins them, syncs and renames. After [`StoreWriter::checkpoint`] a
/// writer that died goes on with [`StoreWriter::resume`]. Without a path the same bytes are made
/// in memory.
#[derive(Debug)]
pub struct StoreWriter {
    pub(super) target: Option<Target>,
    pub(super) columns: Vec<Spool>,
    pub(super) counts: Counts,
    pub(super) duplicates: Option<Duplicates>,
    /// The group that each duplicate is one of, for votes to be counted again.
    pub(super) repeats: Option<Spool>,
    failed: bool,
}

impl StoreWriter {
    /// Starts a store in memory.
    pub fn in_memory() -> Self {
        let mut sinks = vec![Sink::Memory(vec![0; HEADER])];
        sinks.resize_with(Column::HASHED, || Sink::Memory(Vec::new()));
        Self::start(None, sinks)
    }

    /// Starts a store that will be at `path`. What a writer that died left at `<path>.partial` is
    /// replaced; the folder of a living one is an error.
    pub fn create(path: &Path) -> Result<Self> {
        let target = Target::create(path)?;
        let mut sinks = Vec::new();
        for column in &Column::ALL[..Column::HASHED] {
            sinks.push(target.create_file(column.name())?);
        }
        let room = sinks[0].write(&[0; HEADER]);
        room.map_err(Error::io(&target.partial))?;
        Ok(Self::start(Some(target), sinks))
    }

    fn start(target: Option<Target>, sinks: Vec<Sink>) -> Self {
        let columns = sinks.into_iter().zip(Column::ALL);
        let columns = columns
            .map(|(sink, column)| Spool::new(sink, column.room(), column.start()))
            .collect();
        Self::of(target, columns, Counts::default())
    }

    pub(super) fn of(target: Option<Target>, columns: Vec<Spool>, counts: Counts) -> Self {
        Self {
            target,
            columns,
            counts,
            duplicates: None,
            repeats: None,
            failed: false,
        }
    }

    /// Leaves out groups that say what an earlier one said, and counts them as votes for it.
    /// Only a writer that has no group yet can begin with this.
    pub fn deduplicating(mut self) -> Result<Self> {
        if self.counts.groups > 0 {
            let reason = "a writer that holds groups cannot begin to deduplicate";
            return Err(Error::Invalid(reason.into()));
        }
        if let Some(target) = &self.target {
            let sink = target.create_file(REPEATS)?;
            self.repeats = Some(Spool::new(sink, 0, &[]));
        }
        self.duplicates = Some(Duplicates::new());
        Ok(self)
    }

    /// Number of groups so far.
    pub fn len(&self) -> usize {
        self.counts.groups
    }

    /// Whether there is no group so far.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds one group after [`Group::check`]; a refused group leaves the writer as it was.
    pub fn push(&mut self, group: &Group<'_>) -> Result<Outcome> {
        group.check()?;
        self.usable()?;
        self.check_room(1)?;
        let key = self.duplicates.is_some().then(|| GroupKey::of(group));
        let pushed = self.take(group, key);
        self.noted(pushed)
    }

    /// Adds many groups, all or, where one is refused by its number, none; what became of each.
    pub fn push_many(&mut self, bulk: &Bulk<'_>) -> Result<Vec<Outcome>> {
        let groups = bulk.groups()?;
        self.usable()?;
        self.check_room(groups.len())?;
        let keys = match self.duplicates {
            Some(_) => keys(&groups),
            None => vec![None; groups.len()],
        };
        let pairs = groups.iter().zip(keys);
        let pushed = pairs.map(|(group, key)| self.take(group, key)).collect();
        self.noted(pushed)
    }

    fn check_room(&self, more: usize) -> Result<()> {
        let duplicates = self.duplicates.as_ref();
        duplicates.map_or(Ok(()), |duplicates| duplicates.check_room(more))
    }

    fn take(&mut self, group: &Group<'_>, key: Option<GroupKey>) -> io::Result<Outcome> {
        let outcome = match (&mut self.duplicates, key) {
            (Some(duplicates), Some(key)) => duplicates.push(key),
            _ => Outcome::Kept,
        };
        match (outcome, &mut self.repeats) {
            (Outcome::Duplicate(first), Some(repeats)) => {
                repeats.write(&(first as u32).to_le_bytes())?;
            }
            (Outcome::Duplicate(_), None) => {}
            _ => self.write(group)?,
        }
        Ok(outcome)
    }

    fn write(&mut self, group: &Group<'_>) -> io::Result<()> {
        self.put(Column::Tokens, bytemuck::cast_slice(group.prompt_ids))?;
        self.put(Column::Tokens, bytemuck::cast_slice(group.completion_ids))?;
        self.put(Column::Mask, group.completion_mask)?;
        for &length in group.completion_lengths {
            self.counts.completion_tokens += length as usize;
            let end = self.counts.completion_tokens as u64;
            self.put(Column::CompletionOffsets, &end.to_le_bytes())?;
        }
        self.counts.groups += 1;
        self.counts.completions += group.roles.len();
        self.counts.tokens += group.prompt_ids.len() + group.completion_ids.len();
        let prompts = self.counts.prompt_tokens() as u64;
        let completions = self.counts.completions as u64;
        self.put(Column::PromptOffsets, &prompts.to_le_bytes())?;
        self.put(Column::GroupOffsets, &completions.to_le_bytes())?;
        self.put(Column::Roles, group.roles)?;
        self.put(Column::Files, &group.file.to_le_bytes())?;
        self.put(Column::Lines, &group.line.to_le_bytes())
    }

    fn put(&mut self, column: Column, bytes: &[u8]) -> io::Result<()> {
        self.columns[column as usize].write(bytes)
    }

    /// File number and line of a group that was kept.
    pub fn place(&self, group: i64) -> Result<(u32, u64)> {
        self.usable()?;
        let group = error::index("group", group, self.len())?;
        let read = || {
            let file = self.columns[Column::Files as usize].read_at(4 * group)?;
            let line = self.columns[Column::Lines as usize].read_at(8 * group)?;
            Ok((u32::from_le_bytes(file), u64::from_le_bytes(line)))
        };
        read().map_err(Error::io(self.name(|target| &target.partial)))
    }

    /// Groups that say the opposite of each other, the earlier one first, and how often each was
    /// said: none where the writer does not deduplicate.
    pub fn conflicts(&self) -> (Vec<[u32; 2]>, Vec<[u32; 2]>) {
        let found = self.duplicates.as_ref();
        found.map_or_else(Default::default, |found| {
            (found.conflicts().to_vec(), found.conflict_votes())
        })
    }

    /// Seals the store with the caller's `metadata` and opens it.
    pub fn finish(mut self, metadata: &str) -> Result<Store> {
        self.usable()?;
        let columns = std::mem::take(&mut self.columns);
        let sealed = seal(columns, self.counts, metadata);
        let sink = self.noted(sealed)?;
        match (&sink, &mut self.target) {
            (Sink::Memory(bytes), _) => Store::from_bytes(bytes),
            (Sink::Disk(file), Some(target)) => {
                target.publish(file)?;
                Store::open(&target.path)
            }
            (Sink::Disk(_), None) => unreachable!("only create() writes to disk"),
        }
    }

    pub(super) fn usable(&self) -> Result<()> {
        let ours = self.target.as_ref().is_none_or(Target::is_ours);
        let closed = Error::Closed {
            what: "store writer",
        };
        if self.failed || !ours {
            return Err(closed);
        }
        Ok(())
    }

    /// Remembers that a write failed: nobody knows which of its bytes arrived.
    pub(super) fn noted<T>(&mut self, result: io::Result<T>) -> Result<T> {
        self.failed |= result.is_err();
        result.map_err(Error::io(self.name(|target| &target.partial)))
    }

    fn name<'a>(&'a self, of: impl FnOnce(&'a Target) -> &'a Path) -> &'a Path {
        self.target.as_ref().map_or(Path::new("<memory>"), of)
    }
}

fn keys(groups: &[Group<'_>]) -> Vec<Option<GroupKey>> {
    let keys = in_parallel(groups.len(), HASHED_TOGETHER, |range| {
        let keys = groups[range].iter().map(|group| Some(GroupKey::of(group)));
        keys.collect::<Vec<_>>()
    });
    keys.concat()
}

impl Target {
    fn create_file(&self, name: &str) -> Result<Sink> {
        let path = self.file(name);
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        file.map(Sink::Disk).map_err(Error::io(&path))
    }
}
