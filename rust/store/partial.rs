//! The folder `<path>.partial` in which a store is written: locked, then published by a rename.

use std::{
    fs::{self, File, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
};

use super::format::Column;
use crate::{Error, Result};

const LOCK: &str = "lock";
/// How often other writers may remove the folder while this one tries to lock it.
const TRIES: usize = 100;
/// The last checkpoint, and the next one until it is complete.
pub const PROGRESS: &str = "progress";
pub const NEXT_PROGRESS: &str = "progress.new";
/// The group that each duplicate is one of.
pub const REPEATS: &str = "repeats";

/// A store's name and its `.partial` folder, which is removed when its writer is dropped,
/// unless a checkpoint was made in it.
#[derive(Debug)]
pub struct PartialFolder {
    pub store: PathBuf,
    pub path: PathBuf,
    /// Whether an unfinished writer leaves the folder to be resumed.
    pub keep: bool,
    /// A forked child must not touch its parent's files.
    owner: u32,
    /// Held until the folder is removed.
    _lock: File,
}

impl PartialFolder {
    /// Takes `<path>.partial` for this writer alone, and empties it.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = Self::lock(path, true)?.expect("a missing folder is made");
        folder.clear().map_err(Error::io(&folder.path))?;
        Ok(folder)
    }

    /// Takes what an earlier writer left at `<path>.partial`, if anything.
    pub fn existing(path: &Path) -> Result<Option<Self>> {
        Self::lock(path, false)
    }

    fn lock(path: &Path, make: bool) -> Result<Option<Self>> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let lock = exclusive(&partial, make).map_err(Error::io(&partial))?;
        Ok(lock.map(|lock| Self {
            store: path.into(),
            path: partial,
            keep: !make,
            owner: process::id(),
            _lock: lock,
        }))
    }

    /// Whether this process made it.
    pub fn is_ours(&self) -> bool {
        self.owner == process::id()
    }

    /// A file of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Creates a file of the folder.
    pub fn create_file(&self, name: &str) -> Result<File> {
        let path = self.file(name);
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        file.map_err(Error::io(&path))
    }

    /// Syncs `file`, the first column with everything appended, renames it to the store's path, and
    /// syncs the folder. In this order: a name that survives a loss of power has all its bytes.
    pub fn publish(&mut self, file: &File) -> Result<()> {
        file.sync_all().map_err(Error::io(&self.path))?;
        let sealed = self.file(Column::Tokens.name());
        fs::rename(sealed, &self.store).map_err(Error::io(&self.store))?;
        self.keep = false;
        sync_folder(self.parent())
    }

    /// The folder that the store and its own folder live in.
    pub fn parent(&self) -> &Path {
        let parent = self.store.parent();
        let parent = parent.filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new("."))
    }

    /// Removes what writers leave, and nothing else that may be in the folder.
    fn clear(&self) -> io::Result<()> {
        let columns = Column::ALL.iter().map(|column| column.name());
        for name in columns.chain([PROGRESS, NEXT_PROGRESS, REPEATS]) {
            match fs::remove_file(self.file(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.keep && self.is_ours() {
            // Nothing can be done about a failure here; the next writer replaces what is left.
            let _ = self.clear();
            let _ = fs::remove_file(self.file(LOCK));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Makes created and renamed files of `folder` survive a loss of power.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(folder))
}

/// Locks the folder's lock file; `None` where there is no folder and none is to be made.
fn exclusive(partial: &Path, make: bool) -> io::Result<Option<File>> {
    let name = partial.join(LOCK);
    let taken = || io::Error::new(ErrorKind::WouldBlock, "another writer holds this folder");
    for _ in 0..TRIES {
        if make {
            match fs::create_dir(partial) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        let mut options = File::options();
        let lock = match options.write(true).create(true).truncate(false).open(&name) {
            // Another writer's folder may go between the two calls.
            Err(error) if error.kind() == ErrorKind::NotFound && make => continue,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Between open and lock another writer may have removed this very file.
        match fs::metadata(&name) {
            Ok(found) if found.ino() == lock.metadata()?.ino() => return Ok(Some(lock)),
            _ => {}
        }
    }
    Err(taken())
}
