#![doc = include_str!("FORMAT.md")]

pub(crate) mod blocks;
mod bulk;
mod columns;
mod duplicates;
mod format;
mod progress;
mod resume;
mod sealing;
mod select;
mod spool;
mod stored;
pub(crate) mod target;
mod threads;
mod verify;
mod warm;
mod writer;

use std::{
    ops::Range,
    path::{self, Path, PathBuf},
};

use blocks::Blocks;
pub use bulk::Bulk;
use bytemuck::Pod;
use columns::{Column, Columns, Counts};
pub use duplicates::Outcome;
use format::Frame;
pub use stored::{StoredCompletion, StoredGroup};
use stored::{known_roles, steps, stored};
use threads::in_parallel;
pub use writer::StoreWriter;

use crate::{
    Error, Result, error,
    fingerprint::{Key, PromptHash},
    map::Map,
    plan::Shape,
    wire::Hex,
};

/// Groups whose keys one thread makes at least.
const KEYED_TOGETHER: usize = 256;

/// Every group of a dataset in flat, memory-mapped columns.
///
/// Opening checks header, footer, sizes and the blocks' checksums as such. Whatever first reads a
/// block compares it with its checksum, and offsets are compared with each other where they are
/// used: [`Error::CorruptStore`] instead of a wrong token, from any method that reads. Any number
/// of threads and forked children may read one store.
#[derive(Debug)]
pub struct Store {
    /// As errors call it.
    name: PathBuf,
    /// Where it is whatever the working directory becomes.
    path: Option<PathBuf>,
    map: Map,
    frame: Frame,
    blocks: Blocks,
}

impl Store {
    /// Maps a sealed store.
    pub fn open(path: &Path) -> Result<Self> {
        let absolute = path::absolute(path).map_err(Error::io(path))?;
        Self::read(path.into(), Some(absolute), Map::open(path)?)
    }

    /// Maps the sealed store that has this `digest`, in hex, and no other.
    pub fn open_known(path: &Path, digest: &str) -> Result<Self> {
        let store = Self::open(path)?;
        let found = Hex(&store.digest()).to_string();
        if found != digest {
            return Err(store.corrupt(format!("its digest is {found}, not {digest}")));
        }
        Ok(store)
    }

    /// Reads the bytes of a sealed store from a copy of them in memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::read("<memory>".into(), None, Map::copy_of(bytes)?)
    }

    fn read(name: PathBuf, path: Option<PathBuf>, map: Map) -> Result<Self> {
        let frame = Frame::read(&name, &map)?;
        let blocks = Blocks::new(frame.places.data.clone(), frame.places.table.start);
        Ok(Self {
            name,
            path,
            map,
            frame,
            blocks,
        })
    }

    /// The absolute path it was opened at; `None` in memory.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Number of groups.
    pub fn len(&self) -> usize {
        self.frame.counts.groups
    }

    /// Whether there is no group.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of completions.
    pub fn completions(&self) -> usize {
        self.frame.counts.completions
    }

    /// Number of tokens, each prompt counted once.
    pub fn tokens(&self) -> usize {
        self.frame.counts.tokens
    }

    /// Hash of the columns, without the metadata.
    pub fn digest(&self) -> [u8; 32] {
        self.frame.digest
    }

    /// The writer's text about this store.
    pub fn metadata(&self) -> Result<&str> {
        let text = self.read(Column::Metadata, 0..self.frame.counts.metadata)?;
        std::str::from_utf8(text).map_err(|_| self.corrupt("the metadata are not UTF-8".into()))
    }

    /// Where the completions of each group begin, and their number: `[G+1]`.
    pub fn completion_offsets(&self) -> Result<&[u64]> {
        self.offsets(Column::GroupOffsets)
    }

    /// Number of the role of each completion: `[N]`.
    pub fn roles(&self) -> Result<&[u8]> {
        known_roles(self, 0..self.completions())
    }

    /// File number of each group: `[G]`.
    pub fn files(&self) -> Result<&[u32]> {
        Columns::read(self, Column::Files, 0..self.len())
    }

    /// Line number of each group: `[G]`.
    pub fn lines(&self) -> Result<&[u64]> {
        Columns::read(self, Column::Lines, 0..self.len())
    }

    /// Tokens of each group, its prompt counted once: `[G]`.
    pub fn shared_lengths(&self) -> Result<Vec<u32>> {
        let shapes = self.shapes()?.into_iter();
        Ok(shapes.map(|shape| shape.tokens).collect())
    }

    /// Tokens of each prompt: `[G]`.
    pub fn prompt_lengths(&self) -> Result<Vec<u32>> {
        Ok(steps(self.offsets(Column::PromptOffsets)?).collect())
    }

    /// Tokens of each completion: `[N]`.
    pub fn completion_lengths(&self) -> Result<Vec<u32>> {
        Ok(steps(self.offsets(Column::CompletionOffsets)?).collect())
    }

    /// Tokens of each completion that count: `[N]`.
    pub fn counted_lengths(&self) -> Result<Vec<u32>> {
        let offsets = self.offsets(Column::CompletionOffsets)?;
        let mask: &[u8] =
            Columns::read(self, Column::Mask, 0..self.frame.counts.completion_tokens)?;
        let counted = |range: Range<usize>| mask[range].iter().map(|&value| u32::from(value)).sum();
        let ranges = offsets
            .windows(2)
            .map(|pair| pair[0] as usize..pair[1] as usize);
        Ok(ranges.map(counted).collect())
    }

    /// The key of each completion in its prompt: `[N]`.
    pub fn keys(&self) -> Result<Vec<Key>> {
        self.keyed(PromptHash::new, |prompt, completion| {
            prompt.key(completion.ids)
        })
    }

    /// The key of the sum over the tokens of each completion that count: `[N]`.
    pub fn sum_keys(&self) -> Result<Vec<Key>> {
        self.keyed(PromptHash::of_sums, |prompt, completion| {
            prompt.sum_key(completion.ids, completion.mask)
        })
    }

    fn keyed(
        &self,
        hash: impl Fn(&[i32]) -> PromptHash + Sync,
        key: impl Fn(&PromptHash, StoredCompletion<'_>) -> Key + Sync,
    ) -> Result<Vec<Key>> {
        let keys = in_parallel(self.len(), KEYED_TOGETHER, |groups| {
            let mut keys = Vec::new();
            for group in groups {
                let group = stored(self, group)?;
                let prompt = hash(group.prompt());
                let completions = group.completions();
                keys.extend(completions.map(|completion| key(&prompt, completion)));
            }
            Ok(keys)
        });
        Ok(keys.into_iter().collect::<Result<Vec<_>>>()?.concat())
    }

    /// What each group costs in a batch: `[G]`.
    pub fn shapes(&self) -> Result<Vec<Shape>> {
        let prompts = steps(self.offsets(Column::PromptOffsets)?);
        let completions = self.offsets(Column::CompletionOffsets)?;
        let groups = self.completion_offsets()?.windows(2);
        let shape = |(prompt, group): (u32, &[u64])| {
            let own = &completions[group[0] as usize..=group[1] as usize];
            Shape::new(prompt as usize, steps(own))
        };
        Ok(prompts.zip(groups).map(shape).collect())
    }

    /// The group at `index`.
    pub fn group(&self, index: i64) -> Result<StoredGroup<'_>> {
        error::index("group", index, self.len()).and_then(|index| stored(self, index))
    }

    /// The groups in order.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = Result<StoredGroup<'_>>> {
        (0..self.len()).map(|index| stored(self, index))
    }
}

impl Columns for Store {
    fn counts(&self) -> Counts {
        self.frame.counts
    }

    fn read<T: Pod>(&self, column: Column, items: Range<usize>) -> Result<&[T]> {
        let place = &self.frame.places.columns[column as usize];
        if items.start > items.end || items.end > place.len() / size_of::<T>() {
            return Err(self.corrupt(format!("{items:?} is outside {}", column.name())));
        }
        let start = place.start + items.start * size_of::<T>();
        let bytes = start..start + items.len() * size_of::<T>();
        match self.blocks.ensure(&self.map, &bytes) {
            // Columns start at multiples of 64 in a map that starts at a page.
            Ok(()) => Ok(bytemuck::cast_slice(&self.map[bytes])),
            Err(block) => Err(self.bad_block(block)),
        }
    }

    fn corrupt(&self, reason: String) -> Error {
        Error::store(&self.name, reason)
    }
}
