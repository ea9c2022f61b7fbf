//! All shards and journals of a folder as one table.

use std::path::Path;

use super::{
    disk::ReadMode,
    folder::{Cache, Fingerprint, Span, ValueKind},
    listing::open_sources,
    source::{self, Agreement, Merged, Source},
};
use crate::{Error, Result, content_key::Key};

impl Cache {
    /// Reads everything that is there now.
    pub fn open(&self, mode: ReadMode) -> crate::Result<CacheReader> {
        CacheReader::new(self, mode)
    }
}

/// Rows whose cache misses overlap.
const AHEAD: usize = 32;

/// The values of one reference, as they were when the reader was opened.
///
/// Journals are checked byte by byte at open, shards by their seal and then block by block as they
/// are read; impossible values are refused again when they are read. Memory holds 48 bytes for each
/// completion that is in a journal, and the checksums of shards.
#[derive(Debug)]
pub struct CacheReader {
    kind: ValueKind,
    agreement: Agreement,
    sources: Vec<Source>,
}

/// Consecutive keys, each once, with their values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Slice {
    /// The keys, ascending: `[n]`.
    pub keys: Vec<Key>,
    /// Number of tokens of each: `[n]`.
    pub tokens: Vec<u32>,
    /// Log-probs end to end, of a cache of every token.
    pub logps: Vec<f32>,
    /// Sums, of a cache of sums.
    pub sums: Vec<f64>,
}

impl CacheReader {
    /// Opens the per-token log-probs in `folder`, which may be in use by any number of writers.
    ///
    /// A torn last block is skipped and counted. Damage before a whole block, a file of another
    /// reference and a shard that is missing, cut or another one are errors.
    pub fn open(folder: &Path, fingerprint: &Fingerprint) -> Result<Self> {
        Cache::new(folder, *fingerprint).open(ReadMode::Map)
    }

    fn new(cache: &Cache, mode: ReadMode) -> Result<Self> {
        let sources = open_sources(cache, mode)?;
        Ok(Self {
            kind: cache.kind,
            agreement: cache.agreement(),
            sources,
        })
    }

    /// What is kept of each completion.
    pub fn kind(&self) -> ValueKind {
        self.kind
    }

    /// Number of records, those that repeat a key included.
    pub fn len(&self) -> usize {
        self.sources.iter().map(Source::rows).sum::<u64>() as usize
    }

    /// Whether there is no record.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of tokens of all records.
    pub fn tokens(&self) -> u64 {
        self.sources.iter().map(Source::all_tokens).sum()
    }

    /// Bytes of all files, journals up to their length when they were opened.
    pub fn bytes(&self) -> u64 {
        self.sources.iter().map(Source::length).sum()
    }

    /// Bytes after the last whole block of each journal: never acknowledged, never read.
    pub fn torn_bytes(&self) -> u64 {
        self.sources.iter().map(Source::torn).sum()
    }

    /// Number of different keys. Walks through all of them, and compares the records of each.
    pub fn distinct(&self) -> Result<u64> {
        source::count_keys(self.agreement, &self.sources)
    }

    /// The row of each key, -1 where there is none. Rows are numbers of this reader alone.
    ///
    /// A key with several records must have one value (to the cache's tolerance); the first by the
    /// name of its file is taken.
    pub fn join(&self, keys: &[Key]) -> Result<Vec<i64>> {
        join(self.agreement, &self.sources, keys)
    }

    /// The log-probs of `rows` end to end, and where each row's begin: `[n+1]`.
    pub fn read(&self, rows: &[i64]) -> Result<(Vec<i64>, Vec<f32>)> {
        self.check_kind(ValueKind::PerToken)?;
        let spans = self.spans(rows)?;
        let mut offsets = Vec::with_capacity(rows.len() + 1);
        offsets.push(0);
        for (_, _, span) in &spans {
            offsets.push(offsets[offsets.len() - 1] + i64::from(span.tokens));
        }
        let mut values = vec![0.0; offsets[rows.len()].unsigned_abs() as usize];
        let mut rest = values.as_mut_slice();
        for spans in spans.chunks(AHEAD) {
            for (source, _, span) in spans {
                source.touch_values(*span);
            }
            for &(source, row, span) in spans {
                let (own, later) = rest.split_at_mut(span.tokens as usize);
                let bytes = bytemuck::cast_slice_mut(own);
                source.fill(span, bytes)?;
                source.check(self.kind, row, bytes)?;
                rest = later;
            }
        }
        Ok((offsets, values))
    }

    /// Where the values of rows are.
    fn spans(&self, rows: &[i64]) -> Result<Vec<(&Source, u64, Span)>> {
        let mut spans = Vec::with_capacity(rows.len());
        for rows in rows.chunks(AHEAD) {
            for &row in rows {
                let (source, row) = place(&self.sources, row)?;
                source.touch_span(row);
            }
            for &row in rows {
                let (source, row) = place(&self.sources, row)?;
                spans.push((source, row, source.span(row)?));
            }
        }
        Ok(spans)
    }

    /// The token counts and sums of `rows`, both `[n]`; those of a per-token cache are taken over
    /// all tokens.
    pub fn read_sums(&self, rows: &[i64]) -> Result<(Vec<u32>, Vec<f64>)> {
        let mut sums = Vec::with_capacity(rows.len());
        let mut values: Vec<f32> = Vec::new();
        let mut tokens = Vec::with_capacity(rows.len());
        for &row in rows {
            let (source, row) = place(&self.sources, row)?;
            tokens.push(match self.kind {
                ValueKind::Sums => source.values(self.kind, row, &mut sums)?,
                ValueKind::PerToken => {
                    values.clear();
                    let count = source.values(self.kind, row, &mut values)?;
                    sums.push(values.iter().copied().map(f64::from).sum());
                    count
                }
            });
        }
        Ok((tokens, sums))
    }

    /// Number of tokens of each of `rows`: `[n]`.
    pub fn lengths(&self, rows: &[i64]) -> Result<Vec<u32>> {
        let spans = self.spans(rows)?;
        Ok(spans.iter().map(|(_, _, span)| span.tokens).collect())
    }

    /// Up to `limit` keys above `after` (from the first on where it is `None`) with their values.
    pub fn slice(&self, after: Option<&Key>, limit: usize) -> Result<Slice> {
        let mut merged = Merged::new(self.agreement, &self.sources, after)?;
        let mut slice = Slice::default();
        while slice.keys.len() < limit
            && let Some(found) = merged.next()?
        {
            let source = &self.sources[found.source];
            slice.keys.push(found.key);
            slice.tokens.push(match self.kind {
                ValueKind::PerToken => source.values(self.kind, found.row, &mut slice.logps)?,
                ValueKind::Sums => source.values(self.kind, found.row, &mut slice.sums)?,
            });
        }
        Ok(slice)
    }

    fn check_kind(&self, wanted: ValueKind) -> Result<()> {
        if self.kind == wanted {
            return Ok(());
        }
        let (found, wanted) = (self.kind.name(), wanted.name());
        let reason = format!("this cache holds {found} values, and {wanted} ones were asked for");
        Err(Error::Invalid(reason))
    }
}

/// Low bits that hold a row's number in its source; the source's number is in the high bits.
const ROW_BITS: u32 = 40;

/// A row of a source as one number.
fn number(source: usize, row: u64) -> i64 {
    ((source as i64) << ROW_BITS) | row as i64
}

/// The source and the row in it that a number names.
pub fn place(sources: &[Source], number: i64) -> Result<(&Source, u64)> {
    let row = number.cast_unsigned() & ((1 << ROW_BITS) - 1);
    let source = usize::try_from(number >> ROW_BITS).ok();
    let source = source.and_then(|source| sources.get(source));
    let found = source.filter(|source| row < source.rows());
    found
        .map(|source| (source, row))
        .ok_or_else(|| Error::OutOfRange {
            what: "row",
            index: number,
            count: sources.iter().map(Source::rows).sum::<u64>() as usize,
        })
}

/// The row of each key, -1 where there is none. Both sides are walked in the order of the keys.
///
/// A key that several sources hold must have one value.
pub fn join(agreement: Agreement, sources: &[Source], keys: &[Key]) -> Result<Vec<i64>> {
    let mut join = Join {
        agreement,
        sources,
        keys,
        rows: vec![-1; keys.len()],
    };
    let order = sorted(keys);
    for source in 0..sources.len() {
        join.walk(source, &order)?;
    }
    Ok(join.rows)
}

struct Join<'a> {
    agreement: Agreement,
    sources: &'a [Source],
    keys: &'a [Key],
    rows: Vec<i64>,
}

impl Join<'_> {
    /// Finds the keys of one source. Both sides are walked in order by the first eight bytes of a key;
    /// the whole key, a random read, is compared only where these are equal.
    fn walk(&mut self, number: usize, order: &[(u64, u64)]) -> Result<()> {
        let source = &self.sources[number];
        let (mut at, mut current) = (0, 0);
        if source.rows() > 0 {
            current = head(&source.key(0)?);
        }
        for &(wanted, index) in order {
            if wanted > current && at < source.rows() {
                at = source.lower_bound(at, &first_key(wanted))?;
                if at < source.rows() {
                    current = head(&source.key(at)?);
                }
            }
            if at == source.rows() {
                break;
            }
            if wanted == current {
                self.take(number, at, index as usize)?;
            }
        }
        Ok(())
    }

    /// Looks for a key among the rows from `at` on.
    fn take(&mut self, number: usize, at: u64, index: usize) -> Result<()> {
        let (source, key) = (&self.sources[number], &self.keys[index]);
        let mut row = source.lower_bound(at, key)?;
        // A key is once in a shard, and as often in a journal as it was appended.
        while row < source.rows() && source.key(row)? == *key {
            let found = &mut self.rows[index];
            if *found == -1 {
                *found = self::number(number, row);
            } else {
                let one = place(self.sources, *found)?;
                self.agreement.check(one, (source, row))?;
            }
            row += 1;
        }
        Ok(())
    }
}

/// The keys' heads and places, in the order of the keys.
fn sorted(keys: &[Key]) -> Vec<(u64, u64)> {
    let mut order: Vec<(u64, u64)> = keys.iter().map(head).zip(0..).collect();
    order.sort_unstable_by(|one, other| {
        let whole = || keys[one.1 as usize].cmp(&keys[other.1 as usize]);
        one.0.cmp(&other.0).then_with(whole)
    });
    order
}

/// The first eight bytes as a number that compares as they do.
fn head(key: &Key) -> u64 {
    u64::from_le_bytes(*key.first_chunk().expect("32 bytes")).swap_bytes()
}

/// The smallest key with this head.
fn first_key(head: u64) -> Key {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&head.swap_bytes().to_le_bytes());
    key
}
