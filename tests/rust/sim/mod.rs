//! A disk in memory that keeps what POSIX promises and nothing more.
//!
//! A loss of power keeps what was synced. Of the rest, every sector of 512 bytes is kept, lost,
//! zero or garbage, a file has any length between the synced and the last one, and every unsynced
//! creation, renaming and removal of a name happened or did not, each for itself. A renamed file may
//! have both names, but not none. Sectors that are only partly unsynced keep their synced bytes
//! (powersafe overwrite, as `SQLite` calls it).
//!
//! Calls can fail: the n-th, or all from the n-th on, before or after they took effect. Bytes can
//! run out. Everything follows from a seed, except the random names of files.
#![allow(dead_code)] // each test crate uses its part

pub mod chance;
pub mod failing;
mod file;
pub mod life;
mod power;
pub mod records;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use logratio::cache::{Disk, DiskFile};

use chance::Chance;
use failing::{Call, Plan};
use file::SimFile;

#[derive(Clone, Debug, Default)]
struct Inode {
    bytes: Arc<Vec<u8>>,
    /// Bytes that survive a loss of power.
    synced: usize,
    /// A sync failed: the system took the pages for written, and no later sync writes them.
    forgotten: bool,
}

/// One change of names, which a loss of power may undo while the folder is not synced.
#[derive(Clone, Debug)]
struct Change {
    folder: PathBuf,
    sets: Vec<(PathBuf, Option<u64>)>,
}

/// What is on the disk, and what is only in the memory of the system.
#[derive(Clone, Debug, Default)]
pub struct State {
    inodes: BTreeMap<u64, Inode>,
    folders: BTreeSet<PathBuf>,
    names: BTreeMap<PathBuf, u64>,
    durable: BTreeMap<PathBuf, u64>,
    changes: Vec<Change>,
    locks: BTreeMap<u64, u64>,
    handles: u64,
    /// Records that were acknowledged, of each cache on this disk.
    pub acknowledged: [usize; 2],
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    /// The state behind every change, where that is recorded.
    history: Option<Vec<State>>,
    plan: Plan,
    interrupt: Option<Interrupt>,
}

/// What somebody else does at the moment of a call, and how many calls there are before it.
struct Interrupt(usize, Box<dyn FnOnce() + Send>);

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in {} calls", self.0)
    }
}

/// The disk. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<Inner>>);

impl SimDisk {
    /// What a machine finds that lost its power in this state.
    pub fn after_power_loss(state: &State, chance: &mut Chance) -> Self {
        Self::of(state.lose_power(chance))
    }

    pub fn of(state: State) -> Self {
        let inner = Inner {
            state,
            ..Inner::default()
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the state behind every change from now on.
    pub fn record(&self) {
        let mut inner = self.inner();
        inner.history = Some(vec![inner.state.clone()]);
    }

    pub fn history(&self) -> Vec<State> {
        self.inner().history.take().expect("recorded")
    }

    pub fn state(&self) -> State {
        self.inner().state.clone()
    }

    pub fn acknowledge(&self, cache: usize, records: usize) {
        self.inner().state.acknowledged[cache] = records;
    }

    /// A disk with these files in one folder.
    pub fn with(folder: &Path, files: &[(String, Vec<u8>)]) -> Self {
        let disk = Self::default();
        disk.inner().state.folders.insert(folder.into());
        for (name, bytes) in files {
            let path = folder.join(name);
            disk.create(&path).expect("a new name");
            disk.sync_folder(folder).expect("syncs");
            disk.overwrite(&path, bytes.clone());
        }
        disk
    }

    /// Replaces a file's bytes behind everybody's back.
    pub fn overwrite(&self, path: &Path, bytes: Vec<u8>) {
        let mut inner = self.inner();
        let inode = inner.state.names[path];
        let synced = bytes.len();
        let bytes = Arc::new(bytes);
        let file = Inode {
            bytes,
            synced,
            forgotten: false,
        };
        inner.state.inodes.insert(inode, file);
    }

    /// The files of a folder.
    pub fn files(&self, folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let inner = self.inner();
        let names = inner.state.names.iter();
        let here = names.filter(|(path, _)| path.parent() == Some(folder));
        here.map(|(path, inode)| (path.clone(), inner.state.inodes[inode].bytes.to_vec()))
            .collect()
    }

    /// Somebody else does something at the moment of a call, before it has an effect.
    pub fn interrupt(&self, calls: usize, other: impl FnOnce() + Send + 'static) {
        self.inner().interrupt = Some(Interrupt(calls, Box::new(other)));
    }

    /// Whether the interruption is still to come; it does not come any more.
    pub fn forget_interrupt(&self) -> bool {
        self.inner().interrupt.take().is_some()
    }

    fn run_interrupt(&self) {
        let due = self.inner().interrupt.take_if(|interrupt| {
            let now = interrupt.0 == 0;
            interrupt.0 = interrupt.0.saturating_sub(1);
            now
        });
        if let Some(Interrupt(_, other)) = due {
            other(); // which calls the disk itself
        }
    }

    pub fn fail(&self, plan: Plan) {
        self.inner().plan = plan;
    }

    /// How many calls were made since the plan was set.
    pub fn calls(&self) -> usize {
        self.inner().plan.calls
    }

    fn file(&self, inode: u64) -> Box<dyn DiskFile> {
        let mut inner = self.inner();
        inner.state.handles += 1;
        let handle = inner.state.handles;
        let disk = self.clone();
        Box::new(SimFile {
            disk,
            inode,
            handle,
        })
    }

    /// One call: fails if that is planned, and notes the state behind it.
    fn call<T>(
        &self,
        call: Call,
        act: impl FnOnce(&mut State, &Plan) -> io::Result<T>,
    ) -> io::Result<T> {
        self.run_interrupt();
        let mut inner = self.inner();
        let inner = &mut *inner;
        let failure = inner.plan.next(call);
        if let Some(kind) = failure
            && !inner.plan.takes_effect
        {
            return Err(kind.into());
        }
        let done = act(&mut inner.state, &inner.plan);
        if call.changes()
            && let Some(history) = &mut inner.history
        {
            history.push(inner.state.clone());
        }
        failure.map_or(done, |kind| Err(kind.into()))
    }
}

impl State {
    fn change(&mut self, folder: &Path, sets: Vec<(PathBuf, Option<u64>)>) {
        for (path, inode) in &sets {
            match inode {
                Some(inode) => self.names.insert(path.clone(), *inode),
                None => self.names.remove(path),
            };
        }
        let folder = folder.into();
        self.changes.push(Change { folder, sets });
    }

    fn find(&self, path: &Path) -> io::Result<u64> {
        self.names.get(path).copied().ok_or(missing())
    }
}

fn missing() -> io::Error {
    ErrorKind::NotFound.into()
}

fn parent(path: &Path) -> &Path {
    path.parent().expect("files are in folders")
}

impl Disk for SimDisk {
    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        self.call(Call::CreateFolder, |state, _| {
            state.folders.insert(folder.into());
            Ok(())
        })
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<String>> {
        self.call(Call::List, |state, _| {
            state.folders.get(folder).ok_or(missing())?;
            let here = state.names.keys();
            let here = here.filter(|path| path.parent() == Some(folder));
            let name = |path: &PathBuf| Some(path.file_name()?.to_str()?.to_owned());
            Ok(here.filter_map(name).collect())
        })
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let inode = self.call(Call::Create, |state, plan| {
            plan.check_room(0)?;
            state.folders.get(parent(path)).ok_or(missing())?;
            if state.names.contains_key(path) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            let inode = state
                .inodes
                .last_key_value()
                .map_or(0, |(last, _)| last + 1);
            state.inodes.insert(inode, Inode::default());
            state.change(parent(path), vec![(path.into(), Some(inode))]);
            Ok(inode)
        })?;
        Ok(self.file(inode))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let inode = self.call(Call::Open, |state, _| state.find(path))?;
        Ok(self.file(inode))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(Call::Rename, |state, _| {
            let inode = state.find(from)?;
            let sets = vec![(to.into(), Some(inode)), (from.into(), None)];
            state.change(parent(to), sets);
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call(Call::Remove, |state, _| {
            state.find(path)?;
            state.change(parent(path), vec![(path.into(), None)]);
            Ok(())
        })
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        self.call(Call::SyncFolder, |state, _| {
            let is_here = |change: &Change| change.folder == folder;
            let changes = std::mem::take(&mut state.changes);
            let (here, other): (Vec<_>, Vec<_>) = changes.into_iter().partition(is_here);
            state.changes = other;
            for (path, inode) in here.into_iter().flat_map(|change| change.sets) {
                match inode {
                    Some(inode) => state.durable.insert(path, inode),
                    None => state.durable.remove(&path),
                };
            }
            Ok(())
        })
    }
}
