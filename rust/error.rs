//! The one error type of this crate.

use std::{
    fmt,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

/// What can go wrong between a tokenized group and a cached log-prob.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a path.
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk is full, or the user's share of it.
    NoSpace {
        /// What did not fit.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// How many bytes there must be room for.
        bytes: usize,
    },
    /// The file is not a store, or part of it is missing or altered.
    CorruptStore {
        /// The store.
        path: PathBuf,
        /// What was expected, what was found, and where.
        reason: String,
    },
    /// The store has a format version that this library does not read.
    StoreVersion {
        /// The store.
        path: PathBuf,
        /// The version of its format.
        found: u32,
        /// The latest version that is read.
        read: u32,
    },
    /// A journal, shard or manifest is damaged, holds impossible values, or belongs to another
    /// reference.
    CorruptCache {
        /// The file.
        path: PathBuf,
        /// What was expected, what was found, and where.
        reason: String,
    },
    /// A caller's argument breaks a rule of the function.
    Invalid(String),
    /// A number points outside what there is.
    OutOfRange {
        /// What is numbered, in the singular.
        what: &'static str,
        /// The number asked for.
        index: i64,
        /// How many there are.
        count: usize,
    },
    /// The writer was closed, failed before and cannot know what reached the disk, or was forked.
    Closed {
        /// What was closed.
        what: &'static str,
    },
}

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Gives an I/O error the path it happened at: `.map_err(Error::io(path))`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            path: path.into(),
            source,
        }
    }

    /// The same for `bytes` that were to be written, and may not have fitted.
    pub(crate) fn write(path: &Path, bytes: usize) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::NoSpace {
                path: path.into(),
                source,
                bytes,
            },
            _ => Self::io(path)(source),
        }
    }

    pub(crate) fn store(path: &Path, reason: impl Into<String>) -> Self {
        Self::CorruptStore {
            path: path.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn cache(path: &Path, reason: impl Into<String>) -> Self {
        Self::CorruptCache {
            path: path.into(),
            reason: reason.into(),
        }
    }
}

/// Turns a caller's number into an index below `count`.
pub(crate) fn index(what: &'static str, index: i64, count: usize) -> Result<usize> {
    let found = usize::try_from(index).ok().filter(|&found| found < count);
    found.ok_or(Error::OutOfRange { what, index, count })
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::NoSpace {
                path,
                source,
                bytes,
            } => write!(
                f,
                "{}: {source} ({bytes} bytes more are needed)",
                path.display()
            ),
            Self::CorruptStore { path, reason } => {
                write!(f, "corrupt store {}: {reason}", path.display())
            }
            Self::StoreVersion { path, found, read } => write!(
                f,
                "{}: a store of format version {found}, but this library reads versions 3 and {read}: \
                 build it again with `logratio data build`",
                path.display(),
            ),
            Self::CorruptCache { path, reason } => {
                write!(f, "corrupt reference cache {}: {reason}", path.display())
            }
            Self::Invalid(reason) => f.write_str(reason),
            Self::OutOfRange { what, index, count } => {
                write!(f, "{what} {index} is out of range: there are {count}")
            }
            Self::Closed { what } => write!(
                f,
                "the {what} is closed, failed before, or belongs to another process"
            ),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } | Self::NoSpace { source, .. } => Some(source),
            _ => None,
        }
    }
}
