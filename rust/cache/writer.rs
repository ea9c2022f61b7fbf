//! Appends log-probs to a journal of its own.

use std::{
    collections::hash_map::RandomState,
    fs::{self, File, TryLockError},
    hash::BuildHasher,
    io::{self, Write},
    path::{Path, PathBuf},
    process,
};

use super::{
    Fingerprint, impossible,
    journal::{self, Chain},
};
use crate::{Error, Result, fingerprint::Key, store::target::sync_folder};

/// The only writer of one new journal, `<host>-<pid>-<random>.journal`.
///
/// Any number of writers, on any number of hosts, may share a folder. A journal without a block is
/// removed when its writer goes.
#[derive(Debug)]
pub struct CacheWriter {
    path: PathBuf,
    file: File,
    chain: Chain,
    failed: bool,
    /// A forked child shares the file, but must neither write nor remove it.
    owner: u32,
}

impl CacheWriter {
    /// Creates `folder` if need be, and in it a journal for the reference with this `fingerprint`.
    pub fn create(folder: &Path, fingerprint: &Fingerprint) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let id = RandomState::new().hash_one(process::id());
        let path = folder.join(name(id));
        let header = journal::header(fingerprint, id);
        let file = create(&path, &header).map_err(Error::io(&path))?;
        let writer = Self {
            path,
            file,
            chain: Chain::new(&header),
            failed: false,
            owner: process::id(),
        };
        sync_folder(folder)?;
        Ok(writer)
    }

    /// The journal.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one block: record `i` has the key `keys[i]` and the log-probs
    /// `logps[offsets[i]..offsets[i + 1]]`. When this returns, the block survives a loss of power.
    ///
    /// Nothing is written when the arguments are refused. After an I/O error nobody knows what
    /// reached the disk: this writer takes no more, and another one goes on in its own journal.
    pub fn append(&mut self, keys: &[Key], offsets: &[i64], logps: &[f32]) -> Result<()> {
        check(keys, offsets, logps)?;
        if let Some((at, value)) = impossible(logps.iter().copied()) {
            let reason = format!("value {at} to append is {value}, which is no log-prob");
            return Err(Error::cache(&self.path, reason));
        }
        if self.failed || self.owner != process::id() {
            return Err(Error::Closed {
                what: "cache writer",
            });
        }
        if keys.is_empty() {
            return Ok(());
        }
        let block = self.chain.block(keys, offsets, logps);
        let written = self
            .file
            .write_all(&block)
            .and_then(|()| self.file.sync_data());
        self.failed = written.is_err();
        written.map_err(Error::io(&self.path))?;
        self.chain.advance(&block);
        Ok(())
    }
}

impl Drop for CacheWriter {
    fn drop(&mut self) {
        if self.chain.is_empty() && self.owner == process::id() {
            // A failure leaves an empty journal behind, which is harmless.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn name(id: u64) -> String {
    let host = gethostname::gethostname();
    let host = host
        .to_string_lossy()
        .replace(|letter: char| !letter.is_ascii_alphanumeric(), "_");
    format!("{host}-{}-{id:016x}.journal", process::id())
}

/// Creates the file for this process alone, and makes its header durable.
fn create(path: &Path, header: &[u8]) -> io::Result<File> {
    let mut file = File::options().append(true).create_new(true).open(path)?;
    match file.try_lock() {
        // The name is new, so the lock only tells others that the journal is alive.
        Err(TryLockError::Error(error)) if error.kind() != io::ErrorKind::Unsupported => {
            return Err(error);
        }
        _ => {}
    }
    file.write_all(header)?;
    file.sync_all()?;
    Ok(file)
}

fn check(keys: &[Key], offsets: &[i64], logps: &[f32]) -> Result<()> {
    let steps = || {
        offsets
            .windows(2)
            .map(|pair| pair[1].saturating_sub(pair[0]))
    };
    let reason = if offsets.len() != keys.len() + 1 {
        format!(
            "{} keys need {} offsets, not {}",
            keys.len(),
            keys.len() + 1,
            offsets.len()
        )
    } else if offsets[0] != 0 || offsets[keys.len()] != logps.len() as i64 {
        format!("offsets must run from 0 to the {} log-probs", logps.len())
    } else if let Some(at) = steps().position(|step| !(1..=i64::from(u32::MAX)).contains(&step)) {
        format!("record {at} has no log-prob, or too many")
    } else if u32::try_from(keys.len()).is_err() {
        format!("{} keys are too many for one block", keys.len())
    } else {
        return Ok(());
    };
    Err(Error::Invalid(reason))
}
