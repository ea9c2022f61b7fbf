//! A sealed store, read through a memory map, and its groups.

use std::{
    hint::black_box,
    ops::Range,
    path::{self, Path, PathBuf},
};

use bytemuck::{NoUninit, Pod, bytes_of, try_cast_slice};

use super::format::{Column, Columns, Counts, Frame, WEIGHTED, is_rising};
use crate::{
    Error, Result,
    content_key::{Key, PromptHash},
    error,
    file_format::{Blocks, Hex},
    group::{Group, ROLES, Shape, VALUES, Values},
    mmap::Map,
    parallel,
};

/// Groups whose keys one thread makes at least.
const KEYED_TOGETHER: usize = 256;

/// For fewer groups than this, touching them first saves no time.
const FEW: usize = 8;

/// Every group of a dataset in flat, memory-mapped columns.
///
/// Opening checks header, footer, sizes and the blocks' checksums as such. Whatever first reads a
/// block compares it with its checksum, and offsets are compared with each other where they are
/// used: [`Error::CorruptStore`] instead of a wrong token, from any method that reads. Any number
/// of threads and forked children may read one store.
#[derive(Debug)]
pub struct Store {
    /// Its name in errors.
    name: PathBuf,
    /// Absolute path, valid whatever the working directory becomes.
    path: Option<PathBuf>,
    pub(super) map: Map,
    pub(super) frame: Frame,
    pub(super) blocks: Blocks,
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
        read_roles(self, 0..self.completions())
    }

    /// Values of each completion, finite or NaN: `[N]`.
    pub fn values(&self) -> Result<&[Values]> {
        let values: &[Values] = Columns::read(self, Column::Values, 0..self.completions())?;
        let flat = values.as_flattened();
        match flat.iter().position(|value| value.is_infinite()) {
            None => Ok(values),
            Some(at) => {
                let (number, name) = (at / VALUES.len(), VALUES[at % VALUES.len()]);
                Err(self.corrupt(format!("the {name} of completion {number} is infinite")))
            }
        }
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
        Ok(lengths_between(self.offsets(Column::PromptOffsets)?).collect())
    }

    /// Tokens of each completion: `[N]`.
    pub fn completion_lengths(&self) -> Result<Vec<u32>> {
        Ok(lengths_between(self.offsets(Column::CompletionOffsets)?).collect())
    }

    /// Tokens of each completion that count: `[N]`.
    pub fn counted_lengths(&self) -> Result<Vec<u32>> {
        let offsets = self.offsets(Column::CompletionOffsets)?;
        let mask: &[u8] =
            Columns::read(self, Column::Mask, 0..self.frame.counts.completion_tokens)?;
        let counted = |range: Range<usize>| {
            let counted = mask[range].iter().map(|&value| u32::from(value != 0));
            counted.sum()
        };
        let ranges = offsets
            .windows(2)
            .map(|pair| pair[0] as usize..pair[1] as usize);
        Ok(ranges.map(counted).collect())
    }

    /// Whether the mask numbers weights.
    pub fn is_weighted(&self) -> bool {
        self.frame.version == WEIGHTED
    }

    /// The mask of completions `numbers`, end to end: 0 = the token does not count, 1 = it counts
    /// once, more = the number of its weight, which the writer's metadata explain.
    pub fn mask(&self, numbers: &[i64]) -> Result<Vec<u8>> {
        let mut found = Vec::new();
        for &number in numbers {
            let number = error::index("completion", number, self.completions())?;
            let ends: &[u64] = Columns::read(self, Column::CompletionOffsets, number..number + 2)?;
            let range = ends[0] as usize..ends[1] as usize;
            if range.start >= range.end || range.end > self.frame.counts.completion_tokens {
                return Err(self.corrupt(format!("completion {number} has no place")));
            }
            found.extend_from_slice(Columns::read(self, Column::Mask, range)?);
        }
        Ok(found)
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
        let keys = parallel::ranges(self.len(), KEYED_TOGETHER, |groups| {
            let mut keys = Vec::new();
            for group in groups {
                let group = read_group(self, group)?;
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
        let prompts = lengths_between(self.offsets(Column::PromptOffsets)?);
        let completions = self.offsets(Column::CompletionOffsets)?;
        let groups = self.completion_offsets()?.windows(2);
        let shape = |(prompt, group): (u32, &[u64])| {
            let own = &completions[group[0] as usize..=group[1] as usize];
            Shape::new(prompt as usize, lengths_between(own))
        };
        Ok(prompts.zip(groups).map(shape).collect())
    }

    /// The group at `index`.
    pub fn group(&self, index: i64) -> Result<StoredGroup<'_>> {
        error::index("group", index, self.len()).and_then(|index| read_group(self, index))
    }

    /// The groups in order.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = Result<StoredGroup<'_>>> {
        (0..self.len()).map(|index| read_group(self, index))
    }

    /// Touches the places that groups `numbers` begin at, column by column.
    ///
    /// In a shuffled epoch every group is a random read: its offsets miss the cache, and only they give
    /// the addresses of the next misses. Reading group by group waits for each miss; here the misses
    /// of many groups overlap. What is read is neither checked nor used.
    pub fn warm(&self, numbers: &[i64]) {
        if numbers.len() < FEW {
            return;
        }
        let prompts: &[u64] = self.unchecked(Column::PromptOffsets);
        let groups: &[u64] = self.unchecked(Column::GroupOffsets);
        let offsets: &[u64] = self.unchecked(Column::CompletionOffsets);
        let roles: &[u8] = self.unchecked(Column::Roles);
        let mask: &[u8] = self.unchecked(Column::Mask);
        let tokens: &[i32] = self.unchecked(Column::Tokens);
        touch(numbers, |number| at(prompts, number) ^ at(groups, number));
        touch(numbers, |number| {
            let first = at(groups, number);
            at(offsets, first) ^ byte_at(roles, first)
        });
        touch(numbers, |number| {
            let start = at(offsets, at(groups, number));
            byte_at(mask, start) ^ byte_at(tokens, start.wrapping_add(at(prompts, number)))
        });
    }

    fn unchecked<T: Pod>(&self, column: Column) -> &[T] {
        let place = self.frame.places.columns[column as usize].clone();
        try_cast_slice(&self.map[place]).unwrap_or_default()
    }

    /// The error of a block that is not what was written.
    #[cold]
    fn bad_block(&self, block: usize) -> Error {
        let range = self.describe(&self.blocks.range(block));
        self.corrupt(format!(
            "the checksum of block {block}, {range}, does not match"
        ))
    }

    pub(super) fn describe(&self, range: &Range<usize>) -> String {
        let inside = |column: &Column| {
            let place = &self.frame.places.columns[*column as usize];
            place.start < range.end && range.start < place.end
        };
        let names = Column::ALL.into_iter().filter(inside).map(Column::name);
        let names: Vec<_> = names.collect();
        format!(
            "bytes {}..{} ({})",
            range.start,
            range.end,
            names.join(", ")
        )
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

/// One group of a store, borrowed from its columns.
#[derive(Clone, Copy, Debug)]
pub struct StoredGroup<'a> {
    /// Prompt, completion 1, completion 2, … end to end.
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

/// The group at `index`, which must be below the number of groups.
///
/// Offsets are used only after they were compared with each other and with their totals, so that
/// forged ones cannot point outside a column.
pub fn read_group(columns: &impl Columns, index: usize) -> Result<StoredGroup<'_>> {
    let prompts = columns.read::<u64>(Column::PromptOffsets, index..index + 2)?;
    let groups = columns.read::<u64>(Column::GroupOffsets, index..index + 2)?;
    let counts = columns.counts();
    let forged = || columns.corrupt(format!("the offsets of group {index} are impossible"));
    if !is_rising(groups) || groups[1] > counts.completions as u64 {
        return Err(forged());
    }
    let (first, last) = (groups[0] as usize, groups[1] as usize);
    let offsets = columns.read::<u64>(Column::CompletionOffsets, first..last + 1)?;
    let (start, end) = (offsets[0], offsets[last - first]);
    let inside = is_rising(prompts)
        && is_rising(offsets)
        && prompts[1] <= counts.prompt_tokens() as u64
        && end <= counts.completion_tokens as u64;
    let begins = index > 0 || [prompts[0], groups[0], start] == [0; 3];
    let totals = [
        counts.prompt_tokens(),
        counts.completions,
        counts.completion_tokens,
    ];
    let ends =
        index + 1 < counts.groups || [prompts[1], groups[1], end] == totals.map(|n| n as u64);
    if !(inside && begins && ends) {
        return Err(forged());
    }
    let tokens = (prompts[0] + start) as usize..(prompts[1] + end) as usize;
    Ok(StoredGroup {
        tokens: columns.read(Column::Tokens, tokens)?,
        prompt_length: (prompts[1] - prompts[0]) as usize,
        first,
        offsets,
        mask: columns.read(Column::Mask, start as usize..end as usize)?,
        roles: read_roles(columns, first..last)?,
    })
}

/// The roles of some completions, all of which have a name.
pub fn read_roles(columns: &impl Columns, items: Range<usize>) -> Result<&[u8]> {
    let roles: &[u8] = columns.read(Column::Roles, items)?;
    let unknown = roles.iter().find(|&&role| usize::from(role) >= ROLES.len());
    match unknown {
        Some(role) => Err(columns.corrupt(format!("role {role} is unknown"))),
        None => Ok(roles),
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

    /// Tokens of each completion.
    pub fn lengths(self) -> impl ExactSizeIterator<Item = u32> {
        lengths_between(self.offsets)
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

    /// The same group as a writer takes it; `lengths` is room for its completions' lengths.
    pub(super) fn to_push<'b>(
        self,
        lengths: &'b mut Vec<u32>,
        values: &'b [Values],
        file: u32,
        line: u64,
    ) -> Group<'b>
    where
        'a: 'b,
    {
        lengths.clear();
        lengths.extend(self.lengths());
        Group {
            prompt_ids: self.prompt(),
            completion_ids: &self.tokens[self.prompt_length..],
            completion_mask: self.mask,
            completion_lengths: lengths,
            roles: self.roles,
            values,
            file,
            line,
        }
    }
}

/// The lengths between offsets that rise.
pub fn lengths_between(offsets: &[u64]) -> impl ExactSizeIterator<Item = u32> {
    offsets.windows(2).map(|pair| (pair[1] - pair[0]) as u32)
}

fn touch(numbers: &[i64], read: impl Fn(u64) -> u64) {
    let values = numbers.iter().map(|number| read(number.cast_unsigned()));
    black_box(values.fold(0, |all, value| all ^ value));
}

fn at(column: &[u64], index: u64) -> u64 {
    column.get(index as usize).copied().unwrap_or_default()
}

fn byte_at<T: NoUninit>(column: &[T], index: u64) -> u64 {
    let item = column.get(index as usize);
    item.map_or(0, |item| u64::from(bytes_of(item)[0]))
}
