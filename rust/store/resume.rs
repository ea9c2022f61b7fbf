//! Checkpoints: what a writer that dies leaves for the next one.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use bytemuck::Pod;

use super::{
    StoreWriter,
    columns::{Column, Columns, Counts},
    duplicates::{Duplicates, GroupKey, Outcome},
    progress::Progress,
    spool::{Sink, Spool},
    stored::stored,
    target::{NEXT_PROGRESS, PROGRESS, REPEATS, Target, sync_folder},
    threads::in_parallel,
    writer::HASHED_TOGETHER,
};
use crate::{Error, Result, map::Map};

/// Groups whose keys are made at a time while the table of duplicates is built again.
const TOGETHER: usize = 1 << 16;

impl StoreWriter {
    /// Makes everything pushed so far, and `note`, survive `kill -9` and a loss of power: what
    /// [`StoreWriter::resume`] goes on from. The folder then stays when the writer is dropped.
    pub fn checkpoint(&mut self, note: &str) -> Result<()> {
        self.usable()?;
        let Some(target) = &self.target else {
            let reason = "a store in memory has no checkpoints: give it a path";
            return Err(Error::Invalid(reason.into()));
        };
        let folder = target.partial.clone();
        let mut spools = self.columns.iter_mut().chain(&mut self.repeats);
        let synced = spools.try_for_each(Spool::sync);
        self.noted(synced)?;
        let spools = self.columns.iter().chain(&self.repeats);
        let progress = Progress {
            counts: self.counts,
            repeats: self.repeats.as_ref().map(|repeats| repeats.end() / 4),
            hashes: spools.map(|spool| *spool.hash().as_bytes()).collect(),
            note: note.into(),
        };
        let published = publish(&folder, &progress.encode());
        self.noted(published)?;
        if let Some(target) = self.target.as_mut().filter(|target| !target.keep) {
            sync_folder(target.parent())?;
            target.keep = true;
        }
        Ok(())
    }

    /// Goes on from the last checkpoint of a writer of `path` that died or was dropped, and gives
    /// back its note; `None` where there is none, or what is left is not what it says. Whatever
    /// was pushed after the checkpoint is gone.
    ///
    /// The columns are read once, to hash them and to find duplicates as before.
    pub fn resume(path: &Path, deduplicate: bool) -> Result<Option<(Self, String)>> {
        let Some(target) = Target::existing(path)? else {
            return Ok(None);
        };
        let folder = target.partial.clone();
        let Some(progress) = read_progress(&target).map_err(Error::io(&folder))? else {
            return Ok(None);
        };
        if progress.repeats.is_some() != deduplicate {
            let other = !deduplicate;
            let reason = format!("the checkpoint was made with deduplicate = {other}");
            return Err(Error::Invalid(reason));
        }
        let Some((mut writer, left)) = reopen(target, &progress)? else {
            return Ok(None);
        };
        match repeated(&left, progress.repeats) {
            // Offsets that were forged: hashes and CRC are right, and yet no writer wrote them.
            Err(Error::CorruptStore { .. }) => Ok(None),
            Err(error) => Err(error),
            Ok(duplicates) => {
                writer.duplicates = duplicates;
                Ok(Some((writer, progress.note)))
            }
        }
    }
}

fn publish(folder: &Path, bytes: &[u8]) -> io::Result<()> {
    let next = folder.join(NEXT_PROGRESS);
    let mut file = File::create(&next)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(next, folder.join(PROGRESS))?;
    File::open(folder)?.sync_all()
}

fn read_progress(target: &Target) -> io::Result<Option<Progress>> {
    match fs::read(target.file(PROGRESS)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        read => Ok(Progress::decode(&read?)),
    }
}

/// Columns as a writer left them, up to a checkpoint; the duplicates' groups last.
struct Left {
    folder: PathBuf,
    counts: Counts,
    columns: Vec<(Map, Range<usize>)>,
}

impl Left {
    fn bytes(&self, column: usize) -> &[u8] {
        let (map, place) = &self.columns[column];
        &map[place.clone()]
    }
}

/// Opens the files and cuts them; `None`, and nothing is cut, where one of them does not hold what
/// the checkpoint says.
fn reopen(target: Target, progress: &Progress) -> Result<Option<(StoreWriter, Left)>> {
    let mut left = Left {
        folder: target.partial.clone(),
        counts: progress.counts,
        columns: Vec::new(),
    };
    let mut spools = Vec::new();
    for ((name, room, length), hash) in parts(progress).zip(&progress.hashes) {
        let path = target.file(name);
        let end = length.and_then(|length| length.checked_add(room));
        let Some(file) = open(&path)? else {
            return Ok(None);
        };
        let map = Map::open(&path)?;
        let Some(end) = end.filter(|&end| end <= map.len()) else {
            return Ok(None);
        };
        left.columns.push((map, room..end));
        let spool = Spool::go_on(Sink::Disk(file), room, left.bytes(spools.len()));
        if spool.hash().as_bytes() != hash {
            return Ok(None);
        }
        spools.push(spool);
    }
    let cut = spools.iter_mut().try_for_each(Spool::cut);
    cut.map_err(Error::io(&left.folder))?;
    let repeats = spools.drain(Column::HASHED..).next();
    let mut writer = StoreWriter::of(Some(target), spools, progress.counts);
    writer.repeats = repeats;
    Ok(Some((writer, left)))
}

/// Name, bytes before it and bytes of every file that a checkpoint speaks of.
fn parts(progress: &Progress) -> impl Iterator<Item = (&'static str, usize, Option<usize>)> {
    let counts = progress.counts;
    let columns = Column::ALL[..Column::HASHED].iter();
    let columns = columns.map(move |column| (column.name(), column.room(), counts.bytes(*column)));
    let repeats = progress.repeats;
    columns.chain(repeats.map(|count| (REPEATS, 0, count.checked_mul(4))))
}

fn open(path: &Path) -> Result<Option<File>> {
    match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(Error::io(path)),
    }
}

/// The table of duplicates of a writer that kept one.
fn repeated(left: &Left, repeats: Option<usize>) -> Result<Option<Duplicates>> {
    if repeats.is_none() {
        return Ok(None);
    }
    let groups = left.counts.groups;
    let mut duplicates = Duplicates::new();
    duplicates.check_room(groups)?;
    for start in (0..groups).step_by(TOGETHER) {
        for key in keys(left, start..groups.min(start + TOGETHER))? {
            if let Outcome::Duplicate(first) = duplicates.push(key) {
                return Err(left.corrupt(format!("group {first} is there twice")));
            }
        }
    }
    let (numbers, _) = left.bytes(Column::HASHED).as_chunks::<4>();
    for number in numbers
        .iter()
        .map(|&bytes| u32::from_le_bytes(bytes) as usize)
    {
        if number >= groups {
            return Err(left.corrupt(format!("a duplicate of group {number}")));
        }
        duplicates.vote(number);
    }
    Ok(Some(duplicates))
}

fn keys(left: &Left, groups: Range<usize>) -> Result<Vec<GroupKey>> {
    let keys = in_parallel(groups.len(), HASHED_TOGETHER, |range| {
        let mut lengths = Vec::new();
        let key = |index| {
            let group = stored(left, groups.start + index)?;
            Ok(GroupKey::of(&group.to_push(&mut lengths, 0, 0)))
        };
        range.map(key).collect::<Result<Vec<_>>>()
    });
    Ok(keys.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

impl Columns for Left {
    fn counts(&self) -> Counts {
        self.counts
    }

    fn read<T: Pod>(&self, column: Column, items: Range<usize>) -> Result<&[T]> {
        let all: &[T] = bytemuck::cast_slice(self.bytes(column as usize));
        let outside = || self.corrupt(format!("{items:?} is outside {}", column.name()));
        all.get(items.clone()).ok_or_else(outside)
    }

    fn corrupt(&self, reason: String) -> Error {
        Error::store(&self.folder, reason)
    }
}
