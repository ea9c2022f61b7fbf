//! The bytes of sealed stores, damaged and forged.
#![allow(dead_code)] // each test crate uses its part

use std::{fs, path::Path};

use logratio::{
    Error,
    group::Layout,
    layout::{Batch, Options},
    plan::{self, Order, Request},
    store::{Store, StoreWriter},
};

use crate::sample::{Sample, fill};

pub const HEADER: usize = 128;
pub const FOOTER: usize = 64;
pub const BLOCK: usize = 64 << 10;

pub fn sign(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// Makes every checksum right, as no accident can, where the header still says where they are.
pub fn sign_all(bytes: &mut [u8]) {
    let footer = bytes.len() - FOOTER;
    let blocks = u64::from_le_bytes(bytes[footer + 32..footer + 40].try_into().expect("8"));
    let table = usize::try_from(blocks)
        .ok()
        .and_then(|blocks| blocks.checked_mul(4)?.checked_next_multiple_of(64))
        .and_then(|length| footer.checked_sub(length))
        .filter(|&table| table >= HEADER);
    if let Some(table) = table {
        for (block, start) in (0..table).step_by(BLOCK).enumerate() {
            let crc = crc32c::crc32c(&bytes[start.max(HEADER)..table.min(start + BLOCK)]);
            bytes[table + 4 * block..][..4].copy_from_slice(&crc.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[table..footer]);
        bytes[footer + 40..footer + 44].copy_from_slice(&crc.to_le_bytes());
    }
    sign(&mut bytes[footer..]);
    sign(&mut bytes[..HEADER]);
}

pub fn sealed_bytes(samples: &[Sample]) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    fill(StoreWriter::create(&path).expect("creates"), samples);
    fs::read(path).expect("reads")
}

/// Opens a copy, whose file is written anew: cutting a file short in place is slow on ext4.
pub fn reopen(folder: &Path, bytes: &[u8]) -> logratio::Result<Store> {
    let path = folder.join("copy.store");
    let _ = fs::remove_file(&path);
    fs::write(&path, bytes).expect("writes");
    Store::open(&path)
}

/// Reads everything that a store can be asked for, each method whatever became of the others.
pub fn touch(store: &Store) -> Vec<logratio::Result<()>> {
    let all: Vec<i64> = (0..store.len() as i64).collect();
    let request = Request::new(Order::LengthGrouped, 2, 64);
    let plan = || plan::plan(&store.shapes()?, &request);
    let lay_out = |layout| {
        let batch = Batch::new(store, &all, Options::new(layout))?;
        let mut arena = vec![0i64; batch.table().bytes() / 8];
        batch.fill(bytemuck::cast_slice_mut(&mut arena))
    };
    store.warm(&[&all[..], &[-1, i64::MAX, i64::MIN, 1, 2, 3, 4, 5]].concat());
    vec![
        plan().map(drop),
        lay_out(Layout::Shared).map(drop),
        lay_out(Layout::Padded).map(drop),
        store.keys().map(drop),
        store.counted_lengths().map(drop),
        store.completion_lengths().map(drop),
        store.prompt_lengths().map(drop),
        store.completion_offsets().map(drop),
        store.roles().map(drop),
        store.values().map(drop),
        store.files().map(drop),
        store.lines().map(drop),
        store.metadata().map(drop),
        store.groups().try_for_each(|group| group.map(drop)),
        store.select(&vec![true; all.len()], None, "").map(drop),
    ]
}

pub fn is_corrupt<T>(result: &logratio::Result<T>) -> bool {
    match result {
        Ok(_) => false,
        Err(Error::CorruptStore { .. } | Error::StoreVersion { .. }) => true,
        Err(error) => panic!("not a corrupt store, but: {error}"),
    }
}
