//! One open file of the disk.

use std::{
    io::{self, ErrorKind},
    sync::Arc,
};

use logratio::{cache::DiskFile, mmap::Map};

use super::{
    Inode, SimDisk,
    failing::{Call, Plan},
};

#[derive(Debug)]
pub struct SimFile {
    pub disk: SimDisk,
    pub inode: u64,
    pub handle: u64,
}

impl SimFile {
    fn call<T>(
        &self,
        call: Call,
        act: impl FnOnce(&mut Inode, &Plan) -> io::Result<T>,
    ) -> io::Result<T> {
        self.disk.call(call, |state, plan| {
            act(state.inodes.get_mut(&self.inode).expect("open"), plan)
        })
    }
}

impl DiskFile for SimFile {
    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let room = self.disk.inner().plan.take_room(bytes.len());
        self.call(Call::Append, |inode, _| {
            Arc::make_mut(&mut inode.bytes).extend_from_slice(&bytes[..room]);
            if room < bytes.len() {
                return Err(ErrorKind::StorageFull.into());
            }
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        let synced = self.call(Call::Sync, |inode, _| {
            if !inode.forgotten {
                inode.synced = inode.bytes.len();
            }
            Ok(())
        });
        if synced.is_err() {
            let mut inner = self.disk.inner();
            let inode = inner.state.inodes.get_mut(&self.inode).expect("open");
            inode.forgotten = true;
        }
        synced
    }

    fn length(&self) -> io::Result<u64> {
        self.call(Call::Length, |inode, _| Ok(inode.bytes.len() as u64))
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.call(Call::Read, |inode, _| {
            let found = inode.bytes.get(at as usize..at as usize + bytes.len());
            bytes.copy_from_slice(found.ok_or(ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn lock(&self) -> io::Result<bool> {
        self.disk.call(Call::Lock, |state, _| {
            let holder = state.locks.entry(self.inode).or_insert(self.handle);
            Ok(*holder == self.handle)
        })
    }

    fn map(&self) -> io::Result<Map> {
        Err(ErrorKind::Unsupported.into())
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut inner = self.disk.inner();
        let locks = &mut inner.state.locks;
        if locks.get(&self.inode) == Some(&self.handle) {
            locks.remove(&self.inode);
        }
    }
}
