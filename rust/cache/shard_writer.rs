//! Writes records, sorted by key, as sealed shards.
//!
//! Rows are collected in Arrow columns; the Arrow writer's bytes go through a [`ShardFile`], which hashes
//! them, makes the checksums and puts the seal before Arrow's footer.

use std::{
    collections::HashMap,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    ArrayRef, FixedSizeBinaryArray, Float32Array, Float64Array, ListArray, RecordBatch, UInt32Array,
};
use arrow_buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow_ipc::{
    MetadataVersion, root_as_message,
    writer::{FileWriter, IpcWriteOptions},
};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use sha2::{Digest, Sha256};

use super::{
    disk::DiskFile,
    folder::{Cache, SHARD, ValueKind},
    shard_format::{Batch, Seal, TAIL},
    source::Source,
};
use crate::{
    Error, Result,
    file_format::{ALIGNMENT, BlockCrcs, Hex, u32_at},
};

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
    /// Held until the shard is in a manifest, so that `compact` does not take it for a leftover.
    _lock: Arc<dyn DiskFile>,
}

/// A shard that is being written, under a name that no reader looks at.
pub struct ShardWriter<'a> {
    cache: &'a Cache,
    partial: PathBuf,
    arrow: FileWriter<ShardFile>,
    schema: SchemaRef,
    columns: Columns,
    batches: Vec<Batch>,
    tokens: u64,
    /// Whether the file has its name.
    published: bool,
}

impl<'a> ShardWriter<'a> {
    pub fn new(cache: &'a Cache) -> Result<Self> {
        let partial = cache.new_partial();
        let file = cache.disk.create(&partial);
        let file = file.map_err(Error::write(&partial, CHUNK))?;
        let _ = file.lock(); // so that `compact` does not take it for a leftover; some file systems have no locks
        let schema = schema(cache);
        let options =
            IpcWriteOptions::try_new(ALIGNMENT, false, MetadataVersion::V5).map_err(Failed);
        let arrow = options.and_then(|options| {
            FileWriter::try_new_with_options(ShardFile::new(file), &schema, options).map_err(Failed)
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

    /// Appends one row; keys must ascend.
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
        let name = format!("{}.{SHARD}", &hash[..NAME]);
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

/// Rows and values of a record batch at most: what is held in memory while writing.
const BATCH_ROWS: usize = 1 << 17;
const BATCH_VALUES: usize = 1 << 22;
/// Rows that will be one record batch.
struct Columns {
    kind: ValueKind,
    keys: Vec<u8>,
    /// Ends of each row's log-probs, from 0 on.
    ends: Vec<i32>,
    tokens: Vec<u32>,
    logps: Vec<f32>,
    sums: Vec<f64>,
}

impl Columns {
    pub fn new(kind: ValueKind) -> Self {
        Self {
            kind,
            keys: Vec::new(),
            ends: vec![0],
            tokens: Vec::new(),
            logps: Vec::new(),
            sums: Vec::new(),
        }
    }

    pub fn rows(&self) -> usize {
        self.keys.len() / 32
    }

    pub fn is_full(&self) -> bool {
        self.rows() >= BATCH_ROWS || self.logps.len() >= BATCH_VALUES
    }

    /// Appends a row; returns its number of tokens.
    pub fn push(&mut self, source: &Source, row: u64) -> Result<u32> {
        let tokens = match self.kind {
            ValueKind::PerToken => source.values(self.kind, row, &mut self.logps)?,
            ValueKind::Sums => source.values(self.kind, row, &mut self.sums)?,
        };
        self.keys.extend(source.key(row)?);
        self.ends.push(self.logps.len() as i32);
        self.tokens.push(tokens);
        Ok(tokens)
    }

    pub fn into_batch(self, schema: &SchemaRef) -> std::result::Result<RecordBatch, ArrowError> {
        let keys = FixedSizeBinaryArray::try_new(32, Buffer::from_vec(self.keys), None)?;
        let mut columns: Vec<ArrayRef> = vec![Arc::new(keys)];
        match self.kind {
            ValueKind::PerToken => columns.push(Arc::new(ListArray::try_new(
                item(),
                OffsetBuffer::new(ScalarBuffer::from(self.ends)),
                Arc::new(Float32Array::from(self.logps)),
                None,
            )?)),
            ValueKind::Sums => {
                columns.push(Arc::new(UInt32Array::from(self.tokens)));
                columns.push(Arc::new(Float64Array::from(self.sums)));
            }
        }
        RecordBatch::try_new(Arc::clone(schema), columns)
    }
}

fn item() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::Float32, false))
}

/// The columns of a cache's shards.
fn schema(cache: &Cache) -> SchemaRef {
    let key = Field::new("key", DataType::FixedSizeBinary(32), false);
    let fields = match cache.kind {
        ValueKind::PerToken => vec![key, Field::new("logps", DataType::List(item()), false)],
        ValueKind::Sums => vec![
            key,
            Field::new("tokens", DataType::UInt32, false),
            Field::new("sum", DataType::Float64, false),
        ],
    };
    let metadata = [
        ("logratio.fingerprint", Hex(&cache.fingerprint).to_string()),
        ("logratio.kind", cache.kind.name().into()),
    ];
    let metadata: HashMap<_, _> = metadata.map(|(name, text)| (name.into(), text)).into();
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

/// Reads from an Arrow message where the columns of its batch begin.
fn locate(kind: ValueKind, message: &[u8], start: usize, rows: usize) -> Batch {
    let metadata = u32_at(message, 4) as usize;
    let body = start + 8 + metadata;
    let parsed = root_as_message(&message[8..8 + metadata]).expect("just written");
    let batch = parsed.header_as_record_batch().expect("a record batch");
    let buffers = batch.buffers().expect("it has columns");
    let at = |buffer: usize| body as u64 + buffers.get(buffer).offset().cast_unsigned();
    // Each column begins with a validity buffer, empty or not.
    let (tokens, values, width) = match kind {
        ValueKind::PerToken => (3, 5, 4),
        ValueKind::Sums => (3, 5, 8),
    };
    Batch {
        rows: rows as u64,
        keys_at: at(1),
        tokens_at: at(tokens),
        values_at: at(values),
        values: buffers.get(values).length().cast_unsigned() / width,
    }
}

/// Bytes handed to the system at once.
const CHUNK: usize = 1 << 20;
/// More than the bytes that describe a batch, at its beginning.
const METADATA: usize = 1 << 12;
/// The file of a shard while it is written: hashed, checksummed, and sealed at the end.
struct ShardFile {
    file: Arc<dyn DiskFile>,
    pending: Vec<u8>,
    pub at: usize,
    crcs: BlockCrcs,
    sha256: Sha256,
    /// The bytes of the batch that is being written.
    pub captured: Option<Vec<u8>>,
    /// What Arrow writes after the batches, held back: the seal goes before it.
    pub tail: Option<Vec<u8>>,
}

impl ShardFile {
    pub fn new(file: Box<dyn DiskFile>) -> Self {
        Self {
            file: file.into(),
            pending: Vec::new(),
            at: 0,
            crcs: BlockCrcs::new(0),
            sha256: Sha256::new(),
            captured: None,
            tail: None,
        }
    }

    /// The file. Its lock is held as long as this value lives.
    pub fn file(&self) -> Arc<dyn DiskFile> {
        Arc::clone(&self.file)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sha256.update(bytes);
        self.pending.extend_from_slice(bytes);
        self.at += bytes.len();
        if self.pending.len() < CHUNK {
            return Ok(());
        }
        self.send()
    }

    fn send(&mut self) -> io::Result<()> {
        self.file.append(&self.pending)?;
        self.pending.clear();
        Ok(())
    }

    /// Puts the seal between Arrow's end of stream and its footer, and makes the file durable.
    /// Returns the file's SHA-256 and the tail's CRC32C.
    pub fn seal(
        &mut self,
        seal: impl FnOnce(u64) -> Seal,
        batches: &[Batch],
    ) -> io::Result<(String, u32)> {
        let tail = self.tail.take().unwrap_or_default();
        let (end, footer) = tail.split_at(8); // of the stream
        self.write_all(end)?;
        let gap = self.at.next_multiple_of(ALIGNMENT) - self.at;
        self.write_all(&[0; ALIGNMENT][..gap])?;
        let crcs = std::mem::replace(&mut self.crcs, BlockCrcs::new(0)).finish();
        let seal = seal(self.at as u64).encode(batches, &crcs, footer);
        self.put(&seal)?;
        self.put(footer)?;
        self.send()?;
        self.file.sync()?;
        let hash = std::mem::take(&mut self.sha256).finalize();
        Ok((
            Hex(&hash).to_string(),
            u32_at(&seal[seal.len() - TAIL..], TAIL - 4),
        ))
    }
}

impl Write for ShardFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(tail) = &mut self.tail {
            tail.extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        if let Some(captured) = &mut self.captured
            && captured.len() < METADATA
        {
            captured.extend_from_slice(bytes);
        }
        self.crcs.update(bytes);
        self.put(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
