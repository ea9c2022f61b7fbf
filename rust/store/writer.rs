//! Streams groups to columns and seals them.

use std::{
    io::{self, Write},
    path::Path,
};

use blake3::Hasher;

use super::{
    Store,
    format::{Column, Counts, FOOTER, Footer, HEADER, header},
    spool::{Sink, Spool},
    target::Target,
};
use crate::{
    Error, Result,
    group::Group,
    map::Map,
    wire::{ALIGNMENT, aligned},
};

/// Where the header will be: it comes last.
const ROOM: &[u8] = &[0; HEADER];

/// Collects groups and seals them as a [`Store`].
///
/// With a path, ids go straight to `<path>.partial` and the other columns to nameless files in the
/// same folder, so memory stays bounded; [`StoreWriter::finish`] joins them, syncs and renames.
/// Without a path the same bytes are made in memory.
#[derive(Debug)]
pub struct StoreWriter {
    target: Option<Target>, // first, so that a dropped writer removes its file while it is locked
    columns: Vec<Spool>,
    counts: Counts,
    failed: bool,
}

impl StoreWriter {
    /// Starts a store in memory.
    pub fn in_memory() -> Self {
        let mut sinks = Column::ALL.map(|_| Sink::Memory(Vec::new()));
        sinks[0] = Sink::Memory(ROOM.to_vec());
        Self::start(None, sinks.into())
    }

    /// Starts a store that will be at `path`. An older `<path>.partial` of a writer that died is
    /// replaced; that of a living one is an error.
    pub fn create(path: &Path) -> Result<Self> {
        let (target, mut file) = Target::lock(path)?;
        file.write_all(ROOM).map_err(Error::io(&target.partial))?;
        let mut sinks = vec![Sink::Disk(file)];
        for _ in 1..Column::ALL.len() {
            let spool = tempfile::tempfile_in(target.folder());
            sinks.push(Sink::Disk(spool.map_err(Error::io(target.folder()))?));
        }
        Ok(Self::start(Some(target), sinks))
    }

    fn start(target: Option<Target>, sinks: Vec<Sink>) -> Self {
        let columns = sinks.into_iter().zip(Column::ALL);
        let columns = columns
            .map(|(sink, column)| Spool::new(sink, column.start()))
            .collect();
        Self {
            target,
            columns,
            counts: Counts::default(),
            failed: false,
        }
    }

    /// Adds one group after [`Group::check`]; a refused group leaves the writer as it was.
    pub fn push(&mut self, group: &Group<'_>) -> Result<()> {
        group.check()?;
        self.usable()?;
        let written = self.write(group);
        self.noted(written)
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
        let prompts = (self.counts.tokens - self.counts.completion_tokens) as u64;
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

    /// Seals the store with the caller's `metadata` and opens it.
    pub fn finish(mut self, metadata: &str) -> Result<Store> {
        self.usable()?;
        let written = self.put(Column::Metadata, metadata.as_bytes());
        self.noted(written)?;
        let sealed = seal(std::mem::take(&mut self.columns), self.counts);
        let sink = self.noted(sealed)?;
        let map = match (&sink, &mut self.target) {
            (Sink::Memory(bytes), _) => Map::copy_of(bytes)?,
            (Sink::Disk(file), Some(target)) => {
                target.publish(file)?;
                Map::open(&target.path)?
            }
            (Sink::Disk(_), None) => unreachable!("only create() writes to disk"),
        };
        Store::read(self.name(|target| &target.path).into(), map)
    }

    fn usable(&self) -> Result<()> {
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
    fn noted<T>(&mut self, result: io::Result<T>) -> Result<T> {
        self.failed |= result.is_err();
        result.map_err(Error::io(self.name(|target| &target.partial)))
    }

    fn name<'a>(&'a self, of: impl FnOnce(&'a Target) -> &'a Path) -> &'a Path {
        self.target.as_ref().map_or(Path::new("<memory>"), of)
    }
}

/// Joins the columns behind the ids, each at a multiple of 64, then footer and header.
fn seal(columns: Vec<Spool>, counts: Counts) -> io::Result<Sink> {
    let columns = columns
        .into_iter()
        .map(Spool::finish)
        .collect::<io::Result<Vec<_>>>()?;
    let (metadata, hashed) = columns.split_last().expect("nine columns");
    let mut digest = Hasher::new();
    for column in hashed {
        digest.update(column.hash.as_bytes());
    }
    let footer = Footer {
        metadata: metadata.length,
        digest: digest.finalize().into(),
        crcs: std::array::from_fn(|column| columns[column].crc),
    };
    let mut columns = columns.into_iter();
    let tokens = columns.next().expect("nine columns");
    let (mut all, mut end) = (tokens.sink, HEADER + tokens.length);
    let pad = |all: &mut Sink, end: usize| all.write(&[0; ALIGNMENT][..aligned(end) - end]);
    for column in columns {
        pad(&mut all, end)?;
        all.append(column.sink)?;
        end = aligned(end) + column.length;
    }
    pad(&mut all, end)?;
    all.write(&footer.encode())?;
    all.overwrite_start(&header(counts, aligned(end) + FOOTER))?;
    Ok(all)
}
