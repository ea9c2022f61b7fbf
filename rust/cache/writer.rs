//! Appends log-probs to a new journal.

use std::{
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    process,
};

use super::{
    disk::DiskFile,
    folder::{
        Cache, Fingerprint, JOURNAL, NAMES, PARTIAL, ValueKind, random_id, writer_name, wrong_kind,
    },
    journal::{self, Chain},
    listing::{TRIES, busy},
};
use crate::{Error, Result, content_key::Key};

impl Cache {
    /// Appends to a new journal.
    pub fn writer(&self) -> crate::Result<CacheWriter> {
        CacheWriter::new(self.clone())
    }
}

/// The only writer of one new journal, `<host>-<pid>-<random>.journal`.
///
/// Any number of writers, on any number of hosts, may share a folder. A journal without a block is
/// removed when its writer is dropped.
#[derive(Debug)]
pub struct CacheWriter {
    cache: Cache,
    path: PathBuf,
    file: Box<dyn DiskFile>,
    chain: Chain,
    length: u64,
    failed: bool,
    /// A forked child shares the file, but must neither write nor remove it.
    owner: u32,
}

impl CacheWriter {
    /// Creates `folder` if need be, and in it a journal of per-token log-probs of the reference
    /// with this `fingerprint`.
    pub fn create(folder: &Path, fingerprint: &Fingerprint) -> Result<Self> {
        Cache::new(folder, *fingerprint).writer()
    }

    fn new(cache: Cache) -> Result<Self> {
        let folder = cache.folder();
        let made = cache.disk.create_folder(folder);
        made.map_err(Error::write(folder, NAMES))?;
        let (path, file, header) = (0..TRIES)
            .find_map(|_| create(&cache).transpose())
            .unwrap_or_else(|| Err(busy(folder)))?;
        Ok(Self {
            path,
            file,
            chain: Chain::new(&header),
            length: header.len() as u64,
            failed: false,
            owner: process::id(),
            cache,
        })
    }

    /// The journal.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the journal. Around a gigabyte, seal it and continue in a new one.
    pub fn bytes(&self) -> u64 {
        self.length
    }

    /// Appends one block: record `i` has the key `keys[i]` and the log-probs
    /// `logps[offsets[i]..offsets[i + 1]]`. When this returns, the block survives a loss of power.
    ///
    /// Nothing is written when the arguments are refused. After an I/O error it is unknown what
    /// reached the disk: this writer takes no more, and a new one can continue in its own journal.
    pub fn append(&mut self, keys: &[Key], offsets: &[i64], logps: &[f32]) -> Result<()> {
        check_offsets(keys, offsets, logps)?;
        let step = |pair: &[i64]| pair[1].abs_diff(pair[0]) as u32;
        let tokens: Vec<u32> = offsets.windows(2).map(step).collect();
        self.append_block(
            ValueKind::PerToken,
            keys,
            &tokens,
            bytemuck::cast_slice(logps),
        )
    }

    /// Appends one block of sums: record `i` has the key `keys[i]`, of `tokens[i]` tokens that
    /// count, and `sums[i]`. The same is promised as by [`Self::append`].
    pub fn append_sums(&mut self, keys: &[Key], tokens: &[u32], sums: &[f64]) -> Result<()> {
        if keys.len() != tokens.len() || keys.len() != sums.len() {
            let [keys, tokens, sums] = [keys.len(), tokens.len(), sums.len()];
            let reason = format!("{keys} keys, {tokens} token counts and {sums} sums differ");
            return Err(Error::Invalid(reason));
        }
        self.append_block(ValueKind::Sums, keys, tokens, bytemuck::cast_slice(sums))
    }

    fn append_block(
        &mut self,
        kind: ValueKind,
        keys: &[Key],
        tokens: &[u32],
        values: &[u8],
    ) -> Result<()> {
        if let Some(reason) = wrong_kind(self.cache.kind as u32, kind) {
            return Err(Error::Invalid(format!("{}: {reason}", self.path.display())));
        }
        if u32::try_from(keys.len()).is_err() {
            let reason = format!("{} keys are too many for one block", keys.len());
            return Err(Error::Invalid(reason));
        }
        if let Some((at, value)) = kind.impossible(values) {
            let reason = format!("value {at} to append is {value}, which is no log-prob");
            return Err(Error::cache(&self.path, reason));
        }
        self.check_open()?;
        if keys.is_empty() {
            return Ok(());
        }
        self.write(&self.chain.block(keys, tokens, values))
    }

    fn write(&mut self, block: &[u8]) -> Result<()> {
        let written = self.file.append(block).and_then(|()| self.file.sync());
        self.failed = written.is_err();
        written.map_err(Error::write(&self.path, block.len()))?;
        self.chain.advance(block);
        self.length += block.len() as u64;
        Ok(())
    }

    fn check_open(&self) -> Result<()> {
        if self.failed || self.owner != process::id() {
            let what = "cache writer";
            return Err(Error::Closed { what });
        }
        Ok(())
    }

    /// Turns the journal into a sealed shard, whose name this returns; `None` where nothing was
    /// appended.
    ///
    /// When this fails the journal stays, and every record in it can be read as before.
    pub fn seal(self) -> Result<Option<String>> {
        if self.owner != process::id() {
            let what = "cache writer";
            return Err(Error::Closed { what });
        }
        let (cache, path) = (self.cache.clone(), self.path.clone());
        let is_empty = self.chain.sequence() == 0;
        if is_empty {
            return Ok(None); // dropping the writer removes the journal
        }
        let sealed = cache.seal(&path)?;
        drop(self); // only now: its lock keeps compaction away from the journal
        Ok(sealed)
    }
}

impl Drop for CacheWriter {
    fn drop(&mut self) {
        if self.chain.sequence() == 0 && self.owner == process::id() {
            // A failure leaves an empty journal, which is harmless.
            let _ = self.cache.disk.remove(&self.path);
        }
    }
}

type Created = (PathBuf, Box<dyn DiskFile>, Vec<u8>);

/// Creates a journal for this process alone, and makes it and its header durable.
///
/// It gets its name once it is locked: else `compact` could take a journal between its creation and
/// its lock for a dead writer's, and remove the name of a file that is then written. `None` where
/// `compact` took the unfinished file for such a one.
fn create(cache: &Cache) -> Result<Option<Created>> {
    let id = random_id();
    let path = cache.path(&format!("{}.{JOURNAL}", writer_name(id)));
    let partial = path.with_extension(PARTIAL);
    let header = journal::header(&cache.fingerprint, cache.kind, id);
    let file = cache.disk.create(&partial);
    let file = file.map_err(Error::write(&path, header.len()))?;
    let named = name_journal(cache, &*file, &header, &partial, &path);
    if !matches!(named, Ok(true)) {
        let _ = cache.disk.remove(&partial); // `compact` tries again
    }
    let named = named.map_err(Error::write(&path, header.len()))?;
    Ok(named.then_some((path, file, header)))
}

/// False if another process has the file's lock or removed its name.
fn name_journal(
    cache: &Cache,
    file: &dyn DiskFile,
    header: &[u8],
    partial: &Path,
    path: &Path,
) -> io::Result<bool> {
    match file.lock() {
        Ok(false) => return Ok(false),
        Err(error) if error.kind() != ErrorKind::Unsupported => return Err(error),
        _ => {}
    }
    file.append(header)?;
    file.sync()?;
    match cache.disk.rename(partial, path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        renamed => renamed?,
    }
    let synced = cache.disk.sync_folder(cache.folder());
    if synced.is_err() {
        let _ = cache.disk.remove(path); // empty, and harmless where it stays
    }
    synced.map(|()| true)
}

fn check_offsets(keys: &[Key], offsets: &[i64], logps: &[f32]) -> Result<()> {
    let steps = || {
        offsets
            .windows(2)
            .map(|pair| pair[1].saturating_sub(pair[0]))
    };
    let (count, wanted) = (offsets.len(), keys.len() + 1);
    let reason = if count != wanted {
        format!("{} keys need {wanted} offsets, not {count}", keys.len())
    } else if offsets[0] != 0 || offsets[keys.len()] != logps.len() as i64 {
        format!("offsets must run from 0 to the {} log-probs", logps.len())
    } else if let Some(at) = steps().position(|step| !(1..=i64::from(u32::MAX)).contains(&step)) {
        format!("record {at} has no log-prob, or too many")
    } else {
        return Ok(());
    };
    Err(Error::Invalid(reason))
}
