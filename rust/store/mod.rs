#![doc = include_str!("FORMAT.md")]

mod format;
mod spool;
pub(crate) mod target;
mod writer;

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use bytemuck::Pod;
use format::{Column, Frame};
pub use writer::StoreWriter;

use crate::{
    Error, Result, error,
    fingerprint::{Key, PromptHash},
    map::Map,
    plan::Shape,
};

/// Every group of a dataset in flat, memory-mapped columns.
///
/// Opening checks header, footer, sizes and that every offset lies inside its column, so nothing
/// that reads a store can leave it. The bytes of ids, masks and sources are checked by
/// [`Store::verify`] only.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    map: Map,
    frame: Frame,
}

/// One group of a store, borrowed from its columns.
#[derive(Clone, Copy, Debug)]
pub struct StoredGroup<'a> {
    /// Prompt, completion 1, completion 2, … as they lie in the store.
    pub tokens: &'a [i32],
    /// Length of the prompt.
    pub prompt_length: usize,
    /// Row number of the first completion.
    pub first: usize,
    offsets: &'a [u64],
    mask: &'a [u8],
    roles: &'a [u8],
}

/// One completion of a store.
#[derive(Clone, Copy, Debug)]
pub struct StoredCompletion<'a> {
    /// Token ids.
    pub ids: &'a [i32],
    /// 1 where a token counts.
    pub mask: &'a [u8],
    /// Number of its role.
    pub role: u8,
}

impl Store {
    /// Maps a sealed store.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path.into(), Map::open(path)?)
    }

    fn read(path: PathBuf, map: Map) -> Result<Self> {
        let frame = Frame::read(&path, &map)?;
        let store = Self { path, map, frame };
        store.check_offsets()?;
        Ok(store)
    }

    fn check_offsets(&self) -> Result<()> {
        let counts = self.frame.counts;
        let prompt_tokens = counts.tokens.wrapping_sub(counts.completion_tokens);
        let rising = |column, last: usize| {
            let offsets = self.column::<u64>(column);
            let steps = offsets.windows(2).all(|pair| {
                pair[1]
                    .checked_sub(pair[0])
                    .is_some_and(|step| (1..=u64::from(u32::MAX)).contains(&step))
            });
            steps && offsets[0] == 0 && offsets[offsets.len() - 1] == last as u64
        };
        let reason = if !rising(Column::PromptOffsets, prompt_tokens) {
            "prompt offsets do not rise to the number of prompt tokens"
        } else if !rising(Column::CompletionOffsets, counts.completion_tokens) {
            "completion offsets do not rise to the number of completion tokens"
        } else if !rising(Column::GroupOffsets, counts.completions) {
            "group offsets do not rise to the number of completions"
        } else if std::str::from_utf8(self.column(Column::Metadata)).is_err() {
            "the metadata are not UTF-8"
        } else {
            return Ok(());
        };
        Err(Error::store(&self.path, reason))
    }

    /// Compares every column with its checksum.
    pub fn verify(&self) -> Result<()> {
        for (column, &expected) in Column::ALL.into_iter().zip(&self.frame.footer.crcs) {
            if crc32c::crc32c(self.column(column)) != expected {
                let range = &self.frame.columns[column as usize];
                let reason = format!("the checksum of {column:?} (bytes {range:?}) does not match");
                return Err(Error::store(&self.path, reason));
            }
        }
        Ok(())
    }

    fn column<T: Pod>(&self, column: Column) -> &[T] {
        // Columns start at multiples of 64 in a map that starts at a page.
        bytemuck::cast_slice(&self.map[self.frame.columns[column as usize].clone()])
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

    /// The writer's text about this store.
    #[expect(clippy::missing_panics_doc, reason = "checked at open")]
    pub fn metadata(&self) -> &str {
        std::str::from_utf8(self.column(Column::Metadata)).expect("checked at open")
    }

    /// Hash of the columns, without the metadata.
    pub fn digest(&self) -> [u8; 32] {
        self.frame.footer.digest
    }

    /// Where the completions of each group begin, and their number: `[G+1]`.
    pub fn completion_offsets(&self) -> &[u64] {
        self.column(Column::GroupOffsets)
    }

    /// Number of the role of each completion: `[N]`.
    pub fn roles(&self) -> &[u8] {
        self.column(Column::Roles)
    }

    /// File number of each group: `[G]`.
    pub fn files(&self) -> &[u32] {
        self.column(Column::Files)
    }

    /// Line number of each group: `[G]`.
    pub fn lines(&self) -> &[u64] {
        self.column(Column::Lines)
    }

    /// Tokens of each group, its prompt counted once: `[G]`.
    pub fn shared_lengths(&self) -> Vec<u32> {
        self.groups()
            .map(|group| group.tokens.len() as u32)
            .collect()
    }

    /// Tokens of each prompt: `[G]`.
    pub fn prompt_lengths(&self) -> Vec<u32> {
        steps(self.column(Column::PromptOffsets)).collect()
    }

    /// Tokens of each completion: `[N]`.
    pub fn completion_lengths(&self) -> Vec<u32> {
        steps(self.column(Column::CompletionOffsets)).collect()
    }

    /// Tokens of each completion that count: `[N]`.
    pub fn counted_lengths(&self) -> Vec<u32> {
        let mask = self.column::<u8>(Column::Mask);
        let counted = |range: Range<usize>| mask[range].iter().map(|&value| u32::from(value)).sum();
        ranges(self.column(Column::CompletionOffsets))
            .map(counted)
            .collect()
    }

    /// The key of each completion in its prompt: `[N]`.
    pub fn keys(&self) -> Vec<Key> {
        let mut keys = Vec::with_capacity(self.completions());
        for group in self.groups() {
            let prompt = PromptHash::new(group.prompt());
            keys.extend(
                group
                    .completions()
                    .map(|completion| prompt.key(completion.ids)),
            );
        }
        keys
    }

    /// What each group costs in a batch: `[G]`.
    pub fn shapes(&self) -> Vec<Shape> {
        self.groups().map(StoredGroup::shape).collect()
    }

    /// The group at `index`.
    pub fn group(&self, index: i64) -> Result<StoredGroup<'_>> {
        error::index("group", index, self.len()).map(|index| self.at(index))
    }

    /// Every group in order.
    pub fn groups(&self) -> impl Iterator<Item = StoredGroup<'_>> {
        (0..self.len()).map(|index| self.at(index))
    }

    fn at(&self, index: usize) -> StoredGroup<'_> {
        let prompts: &[u64] = self.column(Column::PromptOffsets);
        let groups: &[u64] = self.column(Column::GroupOffsets);
        let (first, last) = (groups[index] as usize, groups[index + 1] as usize);
        let offsets = &self.column::<u64>(Column::CompletionOffsets)[first..=last];
        let (start, end) = (offsets[0], offsets[last - first]);
        let tokens = (prompts[index] + start) as usize..(prompts[index + 1] + end) as usize;
        StoredGroup {
            tokens: &self.column(Column::Tokens)[tokens],
            prompt_length: (prompts[index + 1] - prompts[index]) as usize,
            first,
            offsets,
            mask: &self.column(Column::Mask)[start as usize..end as usize],
            roles: &self.roles()[first..last],
        }
    }
}

impl<'a> StoredGroup<'a> {
    /// Ids of the prompt.
    pub fn prompt(self) -> &'a [i32] {
        &self.tokens[..self.prompt_length]
    }

    /// Number of the role of each completion.
    pub fn roles(self) -> &'a [u8] {
        self.roles
    }

    /// The completions in order.
    pub fn completions(self) -> impl ExactSizeIterator<Item = StoredCompletion<'a>> {
        let ids = &self.tokens[self.prompt_length..];
        let base = self.offsets[0] as usize;
        self.offsets
            .windows(2)
            .zip(self.roles)
            .map(move |(pair, &role)| {
                let range = pair[0] as usize - base..pair[1] as usize - base;
                StoredCompletion {
                    ids: &ids[range.clone()],
                    mask: &self.mask[range],
                    role,
                }
            })
    }

    fn shape(self) -> Shape {
        Shape::new(self.prompt_length, steps(self.offsets))
    }
}

fn steps(offsets: &[u64]) -> impl Iterator<Item = u32> {
    offsets.windows(2).map(|pair| (pair[1] - pair[0]) as u32)
}

fn ranges(offsets: &[u64]) -> impl Iterator<Item = Range<usize>> {
    offsets
        .windows(2)
        .map(|pair| pair[0] as usize..pair[1] as usize)
}
