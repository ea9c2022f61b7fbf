//! Rows on their way into a shard, as Arrow's columns.

use std::{collections::HashMap, sync::Arc};

use arrow_array::{
    ArrayRef, FixedSizeBinaryArray, Float32Array, Float64Array, ListArray, RecordBatch, UInt32Array,
};
use arrow_buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow_ipc::root_as_message;
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};

use super::{Cache, Kind, batch::Batch, source::Source};
use crate::{
    Result,
    wire::{Hex, u32_at},
};

/// Rows and values of a record batch at most: what is held in memory while writing.
const BATCH_ROWS: usize = 1 << 17;
const BATCH_VALUES: usize = 1 << 22;
/// Rows on their way into one record batch.
pub struct Columns {
    kind: Kind,
    keys: Vec<u8>,
    /// Ends of each row's log-probs, from 0 on.
    ends: Vec<i32>,
    tokens: Vec<u32>,
    logps: Vec<f32>,
    sums: Vec<f64>,
}

impl Columns {
    pub fn new(kind: Kind) -> Self {
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

    /// Takes a row over; returns its number of tokens.
    pub fn push(&mut self, source: &Source, row: u64) -> Result<u32> {
        let tokens = match self.kind {
            Kind::PerToken => source.values(self.kind, row, &mut self.logps)?,
            Kind::Sums => source.values(self.kind, row, &mut self.sums)?,
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
            Kind::PerToken => columns.push(Arc::new(ListArray::try_new(
                item(),
                OffsetBuffer::new(ScalarBuffer::from(self.ends)),
                Arc::new(Float32Array::from(self.logps)),
                None,
            )?)),
            Kind::Sums => {
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
pub fn schema(cache: &Cache) -> SchemaRef {
    let key = Field::new("key", DataType::FixedSizeBinary(32), false);
    let fields = match cache.kind {
        Kind::PerToken => vec![key, Field::new("logps", DataType::List(item()), false)],
        Kind::Sums => vec![
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

/// Reads from a message where the columns of its batch lie.
pub fn locate(kind: Kind, message: &[u8], start: usize, rows: usize) -> Batch {
    let metadata = u32_at(message, 4) as usize;
    let body = start + 8 + metadata;
    let parsed = root_as_message(&message[8..8 + metadata]).expect("just written");
    let batch = parsed.header_as_record_batch().expect("a record batch");
    let buffers = batch.buffers().expect("it has columns");
    let at = |buffer: usize| body as u64 + buffers.get(buffer).offset().cast_unsigned();
    // Each column begins with a validity buffer, empty or not.
    let (tokens, values, width) = match kind {
        Kind::PerToken => (3, 5, 4),
        Kind::Sums => (3, 5, 8),
    };
    Batch {
        rows: rows as u64,
        keys_at: at(1),
        tokens_at: at(tokens),
        values_at: at(values),
        values: buffers.get(values).length().cast_unsigned() / width,
    }
}
