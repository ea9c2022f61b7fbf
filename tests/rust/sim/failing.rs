//! Which calls to a disk fail, and how.

use std::{
    io,
    io::ErrorKind,
    sync::atomic::{AtomicUsize, Ordering},
};

/// A call to the disk or one of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    CreateFolder,
    List,
    Create,
    Open,
    Rename,
    Remove,
    SyncFolder,
    Append,
    Sync,
    Length,
    Read,
    Lock,
}

impl Call {
    /// Whether a loss of power finds something else behind this call than before it.
    pub fn changes(self) -> bool {
        use Call::{Append, Create, CreateFolder, Remove, Rename, Sync, SyncFolder};
        matches!(
            self,
            Append | Create | CreateFolder | Remove | Rename | Sync | SyncFolder
        )
    }
}

/// What fails.
#[derive(Debug)]
pub struct Plan {
    /// Number of the first call that fails, of the calls since the plan was set.
    pub fail_at: Option<usize>,
    /// Whether all later ones fail too.
    pub for_ever: bool,
    pub kind: ErrorKind,
    /// Whether what fails has happened all the same.
    pub takes_effect: bool,
    /// Which calls are meant; all where there is none.
    pub only: Option<Call>,
    pub calls: usize,
    /// Bytes that can still be written.
    pub room: AtomicUsize,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            fail_at: None,
            for_ever: false,
            kind: ErrorKind::Other,
            takes_effect: false,
            only: None,
            calls: 0,
            room: AtomicUsize::new(usize::MAX),
        }
    }
}

impl Plan {
    /// How the next call fails, if it does.
    pub fn next(&mut self, call: Call) -> Option<ErrorKind> {
        if self.only.is_some_and(|only| only != call) {
            return None;
        }
        let number = self.calls;
        self.calls += 1;
        let fails = self
            .fail_at
            .is_some_and(|at| number == at || (self.for_ever && number > at));
        fails.then_some(self.kind)
    }

    /// A new file needs room, whatever will be in it.
    pub fn check_room(&self, bytes: usize) -> io::Result<()> {
        if self.room.load(Ordering::Relaxed) <= bytes {
            return Err(ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// How many of so many bytes can be written.
    pub fn take_room(&self, bytes: usize) -> usize {
        let room = self.room.load(Ordering::Relaxed);
        let taken = room.min(bytes);
        if room != usize::MAX {
            self.room.store(room - taken, Ordering::Relaxed);
        }
        taken
    }
}
