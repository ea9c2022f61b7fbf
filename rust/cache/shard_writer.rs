//! Writes records, sorted by key, as sealed shards.

use std::{
    hash::{BuildHasher, RandomState},
    path::{Path, PathBuf},
    process,
    sync::Arc,
};

use arrow_ipc::{
    MetadataVersion,
    writer::{FileWriter, IpcWriteOptions},
};
use arrow_schema::{ArrowError, SchemaRef};

use super::{
    Cache,
    batch::Batch,
    columns::{Columns, locate, schema},
    disk::DiskFile,
    shard::EXTENSION,
    shard_seal::Seal,
    snapshot::PARTIAL,
    source::Source,
    tee::{CHUNK, Tee},
    writer::writer_name,
};
use crate::{Error, Result, file_format::ALIGNMENT};

/// Digits of the SHA-256 in a shard's name.
const NAME: usize = 32;

/// A shard that is durable under its name.
#[derive(Debug)]
pub struct Written {
    pub name: String,
    pub sha256: String,
    pub rows: u64,
    pub tokens: u64,
    pub bytes: u64,
    /// CRC32C of the tail.
    pub seal: u32,
    /// Holds the file's lock until the shard is in a manifest: its writer lives, it is no leftover.
    _lock: Arc<dyn DiskFile>,
}

/// A shard that is being written, under a name that no reader looks at.
pub struct ShardWriter<'a> {
    cache: &'a Cache,
    partial: PathBuf,
    arrow: FileWriter<Tee>,
    schema: SchemaRef,
    columns: Columns,
    batches: Vec<Batch>,
    tokens: u64,
    /// Whether the file has its name.
    published: bool,
}

impl<'a> ShardWriter<'a> {
    pub fn new(cache: &'a Cache) -> Result<Self> {
        let id = RandomState::new().hash_one(process::id());
        let partial = cache.path(&format!("{}.{PARTIAL}", writer_name(id)));
        let file = cache.disk.create(&partial);
        let file = file.map_err(Error::write(&partial, CHUNK))?;
        let _ = file.lock(); // tells `compact` that the writer lives, where there are locks
        let schema = schema(cache);
        let options =
            IpcWriteOptions::try_new(ALIGNMENT, false, MetadataVersion::V5).map_err(Failed);
        let arrow = options.and_then(|options| {
            FileWriter::try_new_with_options(Tee::new(file), &schema, options).map_err(Failed)
        });
        Ok(Self {
            arrow: arrow.map_err(|failed| failed.at(&partial))?,
            cache,
            columns: Columns::new(cache.kind),
            batches: Vec::new(),
            tokens: 0,
            published: false,
            schema,
            partial,
        })
    }

    /// Bytes so far, without the batch that is being filled.
    pub fn bytes(&self) -> usize {
        self.arrow.get_ref().at
    }

    /// Takes over one row; their keys must ascend.
    pub fn push(&mut self, source: &Source, row: u64) -> Result<()> {
        self.tokens += u64::from(self.columns.push(source, row)?);
        if self.columns.is_full() {
            self.write_batch()?;
        }
        Ok(())
    }

    fn write_batch(&mut self) -> Result<()> {
        let columns = std::mem::replace(&mut self.columns, Columns::new(self.cache.kind));
        let rows = columns.rows();
        if rows == 0 {
            return Ok(());
        }
        let batch = columns.into_batch(&self.schema);
        let start = self.arrow.get_ref().at;
        self.arrow.get_mut().captured = Some(Vec::new());
        let written = batch.and_then(|batch| self.arrow.write(&batch));
        written.map_err(|error| Failed(error).at(&self.partial))?;
        let captured = self.arrow.get_mut().captured.take().unwrap_or_default();
        self.batches
            .push(locate(self.cache.kind, &captured, start, rows));
        Ok(())
    }

    /// Seals the shard, gives it its name and makes both durable.
    pub fn finish(mut self) -> Result<Written> {
        self.write_batch()?;
        self.arrow.get_mut().tail = Some(Vec::new());
        let finished = self.arrow.finish();
        finished.map_err(|error| Failed(error).at(&self.partial))?;
        let rows = self.batches.iter().map(|batch| batch.rows).sum();
        let (kind, fingerprint) = (self.cache.kind, self.cache.fingerprint);
        let tee = self.arrow.get_mut();
        let seal = |data| Seal {
            fingerprint,
            kind,
            rows,
            tokens: self.tokens,
            data,
        };
        let sealed = tee.seal(seal, &self.batches);
        let (hash, seal) = sealed.map_err(Error::write(&self.partial, CHUNK))?;
        let bytes = self.arrow.get_ref().at as u64;
        let name = format!("{}.{EXTENSION}", &hash[..NAME]);
        self.publish(&name)?;
        Ok(Written {
            name,
            sha256: hash,
            rows,
            tokens: self.tokens,
            bytes,
            seal,
            _lock: self.arrow.get_ref().file(),
        })
    }

    fn publish(&mut self, name: &str) -> Result<()> {
        let path = self.cache.path(name);
        let renamed = self.cache.disk.rename(&self.partial, &path);
        renamed.map_err(Error::write(&path, CHUNK))?;
        self.published = true;
        let folder = self.cache.folder();
        let synced = self.cache.disk.sync_folder(folder);
        synced.map_err(Error::write(folder, CHUNK))
    }
}

impl Drop for ShardWriter<'_> {
    fn drop(&mut self) {
        if !self.published {
            // `compact` removes what cannot be removed here.
            let _ = self.cache.disk.remove(&self.partial);
        }
    }
}

/// What Arrow could not write.
struct Failed(ArrowError);

impl Failed {
    fn at(self, path: &Path) -> Error {
        match self.0 {
            ArrowError::IoError(_, error) => Error::write(path, CHUNK)(error),
            error => Error::cache(path, error.to_string()),
        }
    }
}
