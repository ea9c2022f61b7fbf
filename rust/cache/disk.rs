//! File operations of a cache: the operating system's, or simulated ones that fail on purpose.

use std::{
    fmt::Debug,
    fs::{self, File, TryLockError},
    io::{self, ErrorKind, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use crate::{Error, Result, mmap::Map};

/// Everything that a cache asks of a file system.
///
/// [`Os`] is the real one. Tests put a simulated one in its place, which loses power or fails at
/// the call they choose.
pub trait Disk: Debug + Send + Sync {
    /// Makes a folder and its parents, and makes their names durable; an existing folder is no error.
    fn create_folder(&self, folder: &Path) -> io::Result<()>;
    /// Names of the files of a folder, in no order.
    fn list(&self, folder: &Path) -> io::Result<Vec<String>>;
    /// Makes a file that did not exist.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Opens a file to be read.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Renames a file, replacing one of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file's name; open files can still be read.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes created, renamed and removed names of a folder survive a loss of power.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
}

/// One open file.
pub trait DiskFile: Debug + Send + Sync {
    /// Writes all of `bytes` at the end.
    fn append(&self, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was appended survive a loss of power.
    fn sync(&self) -> io::Result<()>;
    /// Bytes in the file.
    fn length(&self) -> io::Result<u64>;
    /// Fills `bytes` from byte `at` on; a file that ends before is an `UnexpectedEof`.
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;
    /// Takes the file's lock, until the file is closed; false if another process has it.
    ///
    /// `Unsupported` where the file system has no locks.
    fn lock(&self) -> io::Result<bool>;
    /// Maps the file, which must not change from now on. If this fails, the file is read with
    /// [`Self::read_at`].
    fn map(&self) -> io::Result<Map>;
}

/// The operating system's files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Os;

impl Disk for Os {
    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        let Some(parent) = folder.parent() else {
            return Ok(()); // nothing, or the root
        };
        if folder.is_dir() {
            // Another process may have made it and not synced its name yet.
            return match self.sync_folder(parent) {
                Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
                synced => synced,
            };
        }
        self.create_folder(parent)?;
        match fs::create_dir(folder) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.sync_folder(parent)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<String>> {
        let name =
            |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        fs::read_dir(folder)?.map(name).collect()
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut options = File::options();
        let file = options.read(true).append(true).create_new(true).open(path);
        Ok(Box::new(file?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(File::open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let here = folder.as_os_str().is_empty();
        File::open(if here { Path::new(".") } else { folder })?.sync_all()
    }
}

impl DiskFile for File {
    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let mut file = self;
        file.write_all(bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(bytes, at)
    }

    fn lock(&self) -> io::Result<bool> {
        match self.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn map(&self) -> io::Result<Map> {
        Map::of(self)
    }
}

/// How sealed shards are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadMode {
    /// Mapped: the fastest. If another process truncates a shard, this one is killed (SIGBUS).
    #[default]
    Map,
    /// Read with `pread`, for network file systems: a truncated shard is an error.
    Pread,
}

/// The bytes of a sealed file, mapped or read with `pread`.
#[derive(Debug)]
pub enum FileBytes {
    Map(Map),
    File(Box<dyn DiskFile>),
}

impl FileBytes {
    /// A file that cannot be mapped (as on some network file systems) is read with `pread`.
    pub fn new(file: Box<dyn DiskFile>, mode: ReadMode) -> Self {
        let map = (mode == ReadMode::Map).then(|| file.map().ok()).flatten();
        map.map_or(Self::File(file), Self::Map)
    }

    /// Fills `out` from byte `at` on.
    pub fn read(&self, path: &Path, at: usize, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Map(map) => {
                let bytes = map.get(at..at + out.len());
                out.copy_from_slice(bytes.ok_or_else(|| cut(path, map.len() as u64))?);
                Ok(())
            }
            Self::File(file) => file.read_at(out, at as u64).map_err(|error| {
                let ended = error.kind() == io::ErrorKind::UnexpectedEof;
                if ended {
                    cut(path, file.length().unwrap_or(0))
                } else {
                    Error::io(path)(error)
                }
            }),
        }
    }
}

fn cut(path: &Path, length: u64) -> Error {
    Error::cache(path, format!("it was cut to {length} bytes"))
}
