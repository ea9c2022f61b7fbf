//! The file that becomes a store: written beside its name, locked, published by a rename.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
};

use crate::{Error, Result};

/// A store's name and the `.partial` beside it, which is removed unless published.
#[derive(Debug)]
pub struct Target {
    pub path: PathBuf,
    pub partial: PathBuf,
    published: bool,
    /// A forked child must not remove its parent's file.
    owner: u32,
}

impl Target {
    /// Takes `<path>.partial` for this writer alone, and empties it.
    pub fn lock(path: &Path) -> Result<(Self, File)> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let file = exclusive(&partial).map_err(Error::io(&partial))?;
        Ok((
            Self {
                path: path.into(),
                partial,
                published: false,
                owner: process::id(),
            },
            file,
        ))
    }

    /// Whether this process made it.
    pub fn is_ours(&self) -> bool {
        self.owner == process::id()
    }

    /// The folder that both names live in.
    pub fn folder(&self) -> &Path {
        let parent = self
            .path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new("."))
    }

    /// Makes the bytes, then the name, survive a loss of power.
    pub fn publish(&mut self, file: &File) -> Result<()> {
        file.sync_all().map_err(Error::io(&self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(Error::io(&self.path))?;
        self.published = true;
        sync_folder(self.folder())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.published && self.is_ours() {
            // Nothing can be done about a failure here; the next writer replaces the file.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// Makes created and renamed files of `folder` survive a loss of power.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io(folder))
}

fn exclusive(partial: &Path) -> io::Result<File> {
    let mut options = File::options();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(partial)?;
    let taken = || io::Error::new(io::ErrorKind::WouldBlock, "another writer holds this file");
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(taken()),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    // Between open and lock another writer may have published this very file under its real name.
    if fs::metadata(partial).map_err(|_| taken())?.ino() != file.metadata()?.ino() {
        return Err(taken());
    }
    file.set_len(0)?;
    Ok(file)
}
