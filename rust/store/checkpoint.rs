//! Checkpoints: what a writer that dies leaves for the next one.
//!
//! A checkpoint syncs the columns first and then publishes a small file with their lengths and hashes,
//! so everything that the file describes is on the disk.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use bytemuck::Pod;

use super::{
    column_writer::{ColumnWriter, Sink},
    duplicates::{Duplicates, GroupKey, Outcome},
    format::{Column, Columns, Counts},
    partial::{NEXT_PROGRESS, PROGRESS, PartialFolder, REPEATS, sync_folder},
    reader::read_group,
    writer::{HASHED_TOGETHER, StoreWriter},
};
use crate::{
    Error, Result,
    file_format::{ENDIAN_TAG, checksum_matches, u32_at, u64_at, with_checksum},
    mmap::Map,
    parallel,
};

const MAGIC: &[u8; 8] = b"LRSTOREP";
const VERSION: u32 = 3;
/// `repeats` of a writer that does not deduplicate.
const NO_REPEATS: u64 = u64::MAX;

const COUNTS_AT: usize = MAGIC.len() + 8;
const REPEATS_AT: usize = COUNTS_AT + 4 * 8;
const NOTE_AT: usize = REPEATS_AT + 8;
const HASHES_AT: usize = NOTE_AT + 8;

/// What a writer held when a checkpoint was made.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Checkpoint {
    /// Their metadata are 0.
    pub counts: Counts,
    /// Duplicates left out; `None` where the writer does not deduplicate.
    pub repeats: Option<usize>,
    /// Hash of each column, then of the duplicates' groups if there are any.
    pub hashes: Vec<[u8; 32]>,
    /// The caller's text.
    pub note: String,
}

impl Checkpoint {
    pub fn encode(&self) -> Vec<u8> {
        let Counts {
            groups,
            completions,
            tokens,
            completion_tokens,
            metadata: _,
        } = self.counts;
        let numbers = [groups, completions, tokens, completion_tokens];
        let numbers = numbers.map(|count| (count as u64).to_le_bytes());
        let repeats = self.repeats.map_or(NO_REPEATS, |count| count as u64);
        let note = self.note.as_bytes();
        let parts = [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &ENDIAN_TAG.to_le_bytes(),
            numbers.as_flattened(),
            &repeats.to_le_bytes(),
            &(note.len() as u64).to_le_bytes(),
            self.hashes.as_flattened(),
            note,
        ];
        let length = HASHES_AT + 32 * self.hashes.len() + note.len() + 4;
        with_checksum(&parts, length)
    }

    /// `None` where the bytes are not a complete checkpoint of this version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let whole = bytes.len() >= HASHES_AT + 4
            && bytes.starts_with(MAGIC)
            && u32_at(bytes, MAGIC.len()) == VERSION
            && u32_at(bytes, MAGIC.len() + 4) == ENDIAN_TAG
            && checksum_matches(bytes);
        let count = |field: usize| u64_at(bytes, COUNTS_AT + 8 * field) as usize;
        let counts = whole.then(|| Counts {
            groups: count(0),
            completions: count(1),
            tokens: count(2),
            completion_tokens: count(3),
            metadata: 0,
        })?;
        let repeats = Some(u64_at(bytes, REPEATS_AT)).filter(|&count| count != NO_REPEATS);
        let hashes = 32 * (Column::HASHED + usize::from(repeats.is_some()));
        let rest = &bytes[HASHES_AT..bytes.len() - 4];
        let (hashes, note) = rest.split_at_checked(hashes)?;
        let same_length = note.len() as u64 == u64_at(bytes, NOTE_AT);
        (same_length && counts.are_possible()).then_some(())?;
        Some(Self {
            counts,
            repeats: repeats.map(|count| count as usize),
            hashes: hashes
                .chunks_exact(32)
                .map(|hash| hash.try_into().expect("32"))
                .collect(),
            note: String::from_utf8(note.to_vec()).ok()?,
        })
    }
}

/// Groups whose keys are made at a time while the table of duplicates is built again.
const TOGETHER: usize = 1 << 16;

impl StoreWriter {
    /// Makes everything pushed so far, and `note`, survive `kill -9` and a loss of power: what
    /// [`StoreWriter::resume`] continues from. From then on, dropping the writer keeps the folder.
    pub fn checkpoint(&mut self, note: &str) -> Result<()> {
        self.usable()?;
        let Some(folder) = &self.folder else {
            let reason = "a store in memory has no checkpoints: give it a path";
            return Err(Error::Invalid(reason.into()));
        };
        let path = folder.path.clone();
        let mut columns = self.columns.iter_mut().chain(&mut self.repeats);
        let synced = columns.try_for_each(ColumnWriter::sync);
        self.record(synced)?;
        let columns = self.columns.iter().chain(&self.repeats);
        let checkpoint = Checkpoint {
            counts: self.counts,
            repeats: self.repeats.as_ref().map(|repeats| repeats.end() / 4),
            hashes: columns.map(|column| *column.hash().as_bytes()).collect(),
            note: note.into(),
        };
        let published = publish(&path, &checkpoint.encode());
        self.record(published)?;
        if let Some(folder) = self.folder.as_mut().filter(|folder| !folder.keep) {
            sync_folder(folder.parent())?;
            folder.keep = true;
        }
        Ok(())
    }

    /// Continues from the last checkpoint of a writer of `path` that died or was dropped, and gives
    /// back its note; `None` where there is none, or the files do not match it. Whatever
    /// was pushed after the checkpoint is gone.
    ///
    /// The columns are read once, to hash them and to find duplicates as before.
    pub fn resume(path: &Path, deduplicate: bool) -> Result<Option<(Self, String)>> {
        let Some(folder) = PartialFolder::existing(path)? else {
            return Ok(None);
        };
        let read = read_checkpoint(&folder).map_err(Error::io(&folder.path))?;
        let Some(checkpoint) = read else {
            return Ok(None);
        };
        if checkpoint.repeats.is_some() != deduplicate {
            let other = !deduplicate;
            let reason = format!("the checkpoint was made with deduplicate = {other}");
            return Err(Error::Invalid(reason));
        }
        let Some((mut writer, left)) = reopen(folder, &checkpoint)? else {
            return Ok(None);
        };
        match repeated(&left, checkpoint.repeats) {
            // Offsets that were forged: hashes and CRC are right, and yet no writer wrote them.
            Err(Error::CorruptStore { .. }) => Ok(None),
            Err(error) => Err(error),
            Ok(duplicates) => {
                writer.duplicates = duplicates;
                Ok(Some((writer, checkpoint.note)))
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

fn read_checkpoint(folder: &PartialFolder) -> io::Result<Option<Checkpoint>> {
    match fs::read(folder.file(PROGRESS)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        read => Ok(Checkpoint::decode(&read?)),
    }
}

/// Columns as a writer left them, up to a checkpoint; the duplicates' groups last.
struct SavedColumns {
    folder: PathBuf,
    counts: Counts,
    columns: Vec<(Map, Range<usize>)>,
}

impl SavedColumns {
    fn bytes(&self, column: usize) -> &[u8] {
        let (map, place) = &self.columns[column];
        &map[place.clone()]
    }
}

/// Opens the files and cuts them; `None`, and nothing is cut, where one of them does not hold what
/// the checkpoint says.
fn reopen(
    folder: PartialFolder,
    checkpoint: &Checkpoint,
) -> Result<Option<(StoreWriter, SavedColumns)>> {
    let mut left = SavedColumns {
        folder: folder.path.clone(),
        counts: checkpoint.counts,
        columns: Vec::new(),
    };
    let mut columns = Vec::new();
    for ((name, room, length), hash) in parts(checkpoint).zip(&checkpoint.hashes) {
        let path = folder.file(name);
        let end = length.and_then(|length| length.checked_add(room));
        let Some(file) = open(&path)? else {
            return Ok(None);
        };
        let map = Map::open(&path)?;
        let Some(end) = end.filter(|&end| end <= map.len()) else {
            return Ok(None);
        };
        left.columns.push((map, room..end));
        let column = ColumnWriter::continued(Sink::Disk(file), room, left.bytes(columns.len()));
        if column.hash().as_bytes() != hash {
            return Ok(None);
        }
        columns.push(column);
    }
    let cut = columns.iter_mut().try_for_each(ColumnWriter::cut);
    cut.map_err(Error::io(&left.folder))?;
    let repeats = columns.drain(Column::HASHED..).next();
    let mut writer = StoreWriter::of(Some(folder), columns, checkpoint.counts);
    writer.repeats = repeats;
    Ok(Some((writer, left)))
}

/// Name, bytes before it and bytes of every file that a checkpoint speaks of.
fn parts(checkpoint: &Checkpoint) -> impl Iterator<Item = (&'static str, usize, Option<usize>)> {
    let counts = checkpoint.counts;
    let columns = Column::ALL[..Column::HASHED].iter();
    let columns = columns.map(move |column| (column.name(), column.room(), counts.bytes(*column)));
    let repeats = checkpoint.repeats;
    columns.chain(repeats.map(|count| (REPEATS, 0, count.checked_mul(4))))
}

fn open(path: &Path) -> Result<Option<File>> {
    match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(Error::io(path)),
    }
}

/// The table of duplicates of a writer that kept one.
fn repeated(left: &SavedColumns, repeats: Option<usize>) -> Result<Option<Duplicates>> {
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

fn keys(left: &SavedColumns, groups: Range<usize>) -> Result<Vec<GroupKey>> {
    let keys = parallel::ranges(groups.len(), HASHED_TOGETHER, |range| {
        let mut lengths = Vec::new();
        let key = |index| {
            let group = read_group(left, groups.start + index)?;
            Ok(GroupKey::of(&group.to_push(&mut lengths, &[], 0, 0)))
        };
        range.map(key).collect::<Result<Vec<_>>>()
    });
    Ok(keys.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

impl Columns for SavedColumns {
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
