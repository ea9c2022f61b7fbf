//! Streams groups to columns, and seals them as a store.

use std::{io, path::Path};

use super::{
    column_writer::{ColumnWriter, Sink, join},
    duplicates::{Duplicates, GroupKey, Outcome},
    format::{Column, Columns, Counts, HEADER},
    partial::{PartialFolder, REPEATS},
    reader::{Store, read_group},
};
use crate::{
    Error, Result, error,
    group::{Group, NO_VALUES, Values},
    parallel,
};

/// Groups that one thread hashes at least.
pub(super) const HASHED_TOGETHER: usize = 512;

/// Collects groups and seals them as a [`Store`].
///
/// With a path, columns are files in the folder `<path>.partial`, so memory stays bounded;
/// [`StoreWriter::finish`] joins them, syncs and renames. After [`StoreWriter::checkpoint`] a
/// writer that died is continued by [`StoreWriter::resume`]. Without a path the same bytes are made
/// in memory.
#[derive(Debug)]
pub struct StoreWriter {
    pub(super) folder: Option<PartialFolder>,
    pub(super) columns: Vec<ColumnWriter>,
    pub(super) counts: Counts,
    pub(super) duplicates: Option<Duplicates>,
    /// The group that each duplicate is one of, for votes to be counted again.
    pub(super) repeats: Option<ColumnWriter>,
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
        let folder = PartialFolder::create(path)?;
        let mut sinks = Vec::new();
        for column in &Column::ALL[..Column::HASHED] {
            sinks.push(Sink::Disk(folder.create_file(column.name())?));
        }
        let room = sinks[0].write(&[0; HEADER]);
        room.map_err(Error::io(&folder.path))?;
        Ok(Self::start(Some(folder), sinks))
    }

    fn start(folder: Option<PartialFolder>, sinks: Vec<Sink>) -> Self {
        let columns = sinks.into_iter().zip(Column::ALL);
        let columns = columns
            .map(|(sink, column)| ColumnWriter::new(sink, column.room(), column.start()))
            .collect();
        Self::of(folder, columns, Counts::default())
    }

    pub(super) fn of(
        folder: Option<PartialFolder>,
        columns: Vec<ColumnWriter>,
        counts: Counts,
    ) -> Self {
        Self {
            folder,
            columns,
            counts,
            duplicates: None,
            repeats: None,
            failed: false,
        }
    }

    /// Leaves out groups that are equal to an earlier one, and counts them as votes for it.
    /// Only a writer that has no group yet can begin with this.
    pub fn deduplicating(mut self) -> Result<Self> {
        if self.counts.groups > 0 {
            let reason = "a writer that holds groups cannot begin to deduplicate";
            return Err(Error::Invalid(reason.into()));
        }
        if let Some(folder) = &self.folder {
            let file = folder.create_file(REPEATS)?;
            self.repeats = Some(ColumnWriter::new(Sink::Disk(file), 0, &[]));
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
        self.record(pushed)
    }

    /// Adds many groups, all or, where one is refused by its number, none; what became of each.
    pub fn push_many(&mut self, bulk: &Bulk<'_>) -> Result<Vec<Outcome>> {
        let groups = bulk.groups()?;
        self.usable()?;
        self.check_room(groups.len())?;
        let keys = match self.duplicates {
            Some(_) => keys_of(&groups),
            None => vec![None; groups.len()],
        };
        let pairs = groups.iter().zip(keys);
        let pushed = pairs.map(|(group, key)| self.take(group, key)).collect();
        self.record(pushed)
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
        self.write_values(group)?;
        self.put(Column::Files, &group.file.to_le_bytes())?;
        self.put(Column::Lines, &group.line.to_le_bytes())
    }

    /// Every absent value is the same NaN, so that equal groups have equal bytes.
    fn write_values(&mut self, group: &Group<'_>) -> io::Result<()> {
        for completion in 0..group.roles.len() {
            let values = group.values.get(completion).copied().unwrap_or(NO_VALUES);
            let bytes = values.map(|value| {
                let value = if value.is_nan() { f32::NAN } else { value };
                value.to_le_bytes()
            });
            self.put(Column::Values, bytes.as_flattened())?;
        }
        Ok(())
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
        read().map_err(Error::io(self.name()))
    }

    /// Pairs of groups with chosen and rejected exchanged, the earlier one first, and how often each
    /// was pushed: none where the writer does not deduplicate.
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
        let sealed = join(columns, self.counts, metadata);
        let sink = self.record(sealed)?;
        match (&sink, &mut self.folder) {
            (Sink::Memory(bytes), _) => Store::from_bytes(bytes),
            (Sink::Disk(file), Some(folder)) => {
                folder.publish(file)?;
                Store::open(&folder.store)
            }
            (Sink::Disk(_), None) => unreachable!("only create() writes to disk"),
        }
    }

    pub(super) fn usable(&self) -> Result<()> {
        let ours = self.folder.as_ref().is_none_or(PartialFolder::is_ours);
        let closed = Error::Closed {
            what: "store writer",
        };
        if self.failed || !ours {
            return Err(closed);
        }
        Ok(())
    }

    /// Remembers a failed write: it is unknown which of its bytes reached the disk.
    pub(super) fn record<T>(&mut self, result: io::Result<T>) -> Result<T> {
        self.failed |= result.is_err();
        result.map_err(Error::io(self.name()))
    }

    /// Its name in errors.
    fn name(&self) -> &Path {
        self.folder
            .as_ref()
            .map_or(Path::new("<memory>"), |folder| &folder.path)
    }
}

fn keys_of(groups: &[Group<'_>]) -> Vec<Option<GroupKey>> {
    let keys = parallel::ranges(groups.len(), HASHED_TOGETHER, |range| {
        let keys = groups[range].iter().map(|group| Some(GroupKey::of(group)));
        keys.collect::<Vec<_>>()
    });
    keys.concat()
}

impl Store {
    /// Seals the groups for which `keep` holds as a separate store, in the same order, at
    /// `path` or in memory. Groups are copied one by one, so that memory stays bounded.
    pub fn select(&self, keep: &[bool], path: Option<&Path>, metadata: &str) -> Result<Self> {
        if keep.len() != self.len() {
            let (found, groups) = (keep.len(), self.len());
            let reason = format!("keep has {found} values for {groups} groups");
            return Err(Error::Invalid(reason));
        }
        let (files, lines, values) = (self.files()?, self.lines()?, self.values()?);
        let mut writer = path.map_or_else(|| Ok(StoreWriter::in_memory()), StoreWriter::create)?;
        let mut lengths = Vec::new();
        for index in (0..keep.len()).filter(|&index| keep[index]) {
            let group = read_group(self, index)?;
            let values = &values[group.first..group.first + group.roles().len()];
            let group = group.to_push(&mut lengths, values, files[index], lines[index]);
            let refused = |error| match error {
                Error::Invalid(reason) => self.corrupt(format!("group {index}: {reason}")),
                error => error,
            };
            writer.push(&group).map_err(refused)?;
        }
        writer.finish(metadata)
    }
}

/// `G` groups of `N` completions in all: borrowed columns, one group after the other.
#[derive(Clone, Copy, Debug)]
pub struct Bulk<'a> {
    /// Ids of prompt 0, prompt 1, …: `[ΣP]`.
    pub prompt_ids: &'a [i32],
    /// Tokens of each prompt: `[G]`.
    pub prompt_lengths: &'a [u32],
    /// Ids of completion 0, completion 1, …: `[ΣC]`.
    pub completion_ids: &'a [i32],
    /// 1 where a completion's token counts, else 0, or the number of its weight: `[ΣC]`.
    pub completion_mask: &'a [u8],
    /// Tokens of each completion: `[N]`.
    pub completion_lengths: &'a [u32],
    /// Completions of each group: `[G]`.
    pub group_sizes: &'a [u32],
    /// Number of the role of each completion: `[N]`.
    pub roles: &'a [u8],
    /// Values of each completion: `[N]`, or empty where none has any.
    pub values: &'a [Values],
    /// Number of the source file of each group: `[G]`.
    pub files: &'a [u32],
    /// Line in the source file of each group: `[G]`.
    pub lines: &'a [u64],
}

impl<'a> Bulk<'a> {
    /// The groups, each found right by [`Group::check`].
    pub fn groups(&self) -> Result<Vec<Group<'a>>> {
        self.check_sums()?;
        let (mut prompts, mut ids, mut mask) =
            (self.prompt_ids, self.completion_ids, self.completion_mask);
        let (mut lengths, mut roles) = (self.completion_lengths, self.roles);
        let mut values = self.values;
        let numbers = self.prompt_lengths.iter().zip(self.group_sizes);
        let sources = self.files.iter().zip(self.lines);
        let cut = |((&prompt, &size), (&file, &line)): ((&u32, &u32), (&u32, &u64))| {
            let completion_lengths = take(&mut lengths, size as usize);
            let tokens = sum(completion_lengths);
            Group {
                prompt_ids: take(&mut prompts, prompt as usize),
                completion_ids: take(&mut ids, tokens),
                completion_mask: take(&mut mask, tokens),
                completion_lengths,
                roles: take(&mut roles, size as usize),
                values: match self.values {
                    [] => &[],
                    _ => take(&mut values, size as usize),
                },
                file,
                line,
            }
        };
        let groups: Vec<_> = numbers.zip(sources).map(cut).collect();
        for (index, group) in groups.iter().enumerate() {
            let named = |error| Error::Invalid(format!("group {index}: {error}"));
            group.check().map_err(named)?;
        }
        Ok(groups)
    }

    /// Refuses columns that do not belong together; where one ends early, no group can be named.
    fn check_sums(&self) -> Result<()> {
        let groups = self.group_sizes.len();
        let completions = sum(self.group_sizes);
        let (prompts, tokens) = (sum(self.prompt_lengths), sum(self.completion_lengths));
        let valued = if self.values.is_empty() {
            0
        } else {
            completions
        };
        let columns = [
            ("prompt_lengths", self.prompt_lengths.len(), groups),
            ("files", self.files.len(), groups),
            ("lines", self.lines.len(), groups),
            (
                "completion_lengths",
                self.completion_lengths.len(),
                completions,
            ),
            ("roles", self.roles.len(), completions),
            ("values", self.values.len(), valued),
            ("prompt_ids", self.prompt_ids.len(), prompts),
            ("completion_ids", self.completion_ids.len(), tokens),
            ("completion_mask", self.completion_mask.len(), tokens),
        ];
        match columns
            .into_iter()
            .find(|(_, found, expected)| found != expected)
        {
            None => Ok(()),
            Some((name, found, expected)) => Err(Error::Invalid(format!(
                "{name} has {found} values, but the other columns say {expected}"
            ))),
        }
    }
}

fn sum(lengths: &[u32]) -> usize {
    lengths.iter().map(|&length| length as usize).sum()
}

/// Cuts `count` values, which are there, off the front.
fn take<'a, T>(values: &mut &'a [T], count: usize) -> &'a [T] {
    let (taken, left) = values.split_at(count);
    *values = left;
    taken
}
