//! Columns, one behind the other, become a store's bytes.

use std::io;

use blake3::Hasher;

use super::{
    blocks::{self, BlockCrcs},
    columns::{Column, Counts},
    format::{FOOTER, footer, header},
    spool::{Sink, Spool},
};
use crate::wire::{ALIGNMENT, aligned};

/// A file that grows, and the checksums of its blocks.
struct Seal {
    sink: Sink,
    crcs: BlockCrcs,
    end: usize,
}

impl Seal {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crcs.update(bytes);
        self.end += bytes.len();
        self.sink.write(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        self.put(&[0; ALIGNMENT][..aligned(self.end) - self.end])
    }

    /// Table, footer and, in the room before the first column, the header.
    fn close(mut self, counts: Counts, digest: &[u8; 32]) -> io::Result<Sink> {
        let mut table = self.crcs.finish();
        let blocks = blocks::count(self.end);
        table.resize(aligned(table.len()), 0);
        self.sink.write(&table)?;
        self.sink.write(&footer(digest, blocks, &table))?;
        let length = self.end + table.len() + FOOTER;
        self.sink.overwrite_start(&header(counts, length, digest))?;
        Ok(self.sink)
    }
}

/// Appends everything to the first column, whose sink has room for the header.
///
/// The files of the other columns stay as they are: a crash here loses nothing.
pub fn seal(mut columns: Vec<Spool>, counts: Counts, metadata: &str) -> io::Result<Sink> {
    columns.iter_mut().try_for_each(Spool::flush)?;
    let digest = digest(columns.iter().map(|column| *column.hash().as_bytes()));
    let tokens = columns.remove(Column::Tokens as usize);
    let (end, (sink, crcs)) = (tokens.end(), tokens.into_parts());
    let crcs = crcs.expect("the first column has room before it");
    let mut seal = Seal { sink, crcs, end };
    for column in columns {
        seal.pad()?;
        column.pieces(|bytes| seal.put(bytes))?;
    }
    seal.pad()?;
    seal.put(metadata.as_bytes())?;
    seal.pad()?;
    let metadata = metadata.len();
    seal.close(Counts { metadata, ..counts }, &digest)
}

/// The hash of the columns' hashes, in the order of the file.
pub fn digest(hashes: impl Iterator<Item = [u8; 32]>) -> [u8; 32] {
    let mut digest = Hasher::new();
    for hash in hashes {
        digest.update(&hash);
    }
    digest.finalize().into()
}
