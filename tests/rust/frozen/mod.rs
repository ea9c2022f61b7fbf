//! Version 1 of the cache's files, encoded as FORMAT.md says and without the library's encoder.
//!
//! Frozen: when the format gets a new version, this stays, so that old files are read for ever.
#![allow(dead_code)] // each test crate uses its part
#![allow(clippy::cast_sign_loss)] // places in Arrow's footers are signed

use std::{collections::HashMap, sync::Arc};

use arrow_array::{
    ArrayRef, FixedSizeBinaryArray, Float32Array, Float64Array, ListArray, RecordBatch, UInt32Array,
};
use arrow_buffer::{Buffer, OffsetBuffer};
use arrow_ipc::{
    MetadataVersion, root_as_footer, root_as_message,
    writer::{FileWriter, IpcWriteOptions},
};
use arrow_schema::{DataType, Field, Schema};
use logratio::content_key::Key;

pub const FINGERPRINT: [u8; 32] = [7; 32];
pub const JOURNAL_ID: u64 = 0x0123_4567_89ab_cdef;

/// A key and its log-probs.
pub type Record = (Key, Vec<f32>);

/// Two records of one block.
pub fn records(block: u8) -> Vec<Record> {
    let record = |number: u8| {
        let values = (0..=number % 3).map(|at| -0.5 * f32::from(number + at));
        ([number; 32], values.collect())
    };
    vec![record(2 * block), record(2 * block + 1)]
}

pub fn sum(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum()
}

/// Bytes in the order of a machine.
#[derive(Clone, Copy)]
pub enum Order {
    Little,
    Big,
}

/// Bytes that numbers are put behind.
struct Bytes(Vec<u8>, Order);

impl Bytes {
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn number(self, bytes: &[u8]) -> Self {
        let mut bytes = bytes.to_vec();
        if matches!(self.1, Order::Big) {
            bytes.reverse();
        }
        self.raw(&bytes)
    }

    fn u32(self, value: u32) -> Self {
        self.number(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.number(&value.to_le_bytes())
    }

    fn zeros(mut self, length: usize) -> Self {
        self.0.resize(self.0.len() + length, 0);
        self
    }

    fn padded(self) -> Self {
        let gap = self.0.len().next_multiple_of(64) - self.0.len();
        self.zeros(gap)
    }

    fn signed(self) -> Vec<u8> {
        let crc = crc32c::crc32c(&self.0);
        self.u32(crc).0
    }
}

/// A journal of these blocks; `sums` keeps one sum a record.
pub fn journal(order: Order, sums: bool, blocks: &[Vec<Record>]) -> Vec<u8> {
    let new = || Bytes(Vec::new(), order);
    let mut journal = new()
        .raw(b"LRJOURN1")
        .u32(if sums { 2 } else { 1 })
        .u32(0x0102_0304)
        .raw(&FINGERPRINT)
        .u64(JOURNAL_ID)
        .u32(sums.into())
        .signed();
    for (number, records) in blocks.iter().enumerate() {
        let previous: [u8; 4] = if number == 0 {
            journal[60..64].try_into().expect("four")
        } else {
            let last = journal.len() - block(new(), sums, &blocks[number - 1]).len() - 4;
            journal[last..last + 4].try_into().expect("four")
        };
        let payload = block(new(), sums, records);
        let header = new()
            .raw(b"LRBLOCK1")
            .u64(JOURNAL_ID)
            .u64(number as u64)
            .u64(payload.len() as u64)
            .u32(records.len() as u32)
            .raw(&previous)
            .u32(crc32c::crc32c(&payload))
            .zeros(16)
            .signed();
        journal.extend(header);
        journal.extend(payload);
    }
    journal
}

fn block(new: Bytes, sums: bool, records: &[Record]) -> Vec<u8> {
    let keys: Vec<Key> = records.iter().map(|(key, _)| *key).collect();
    let bytes = new.raw(keys.as_flattened());
    let tokens = |bytes: Bytes, (_, values): &Record| bytes.u32(values.len() as u32);
    let bytes = records.iter().fold(bytes, tokens).padded();
    let values = |bytes: Bytes, (_, values): &Record| {
        if sums {
            bytes.u64(sum(values).to_bits())
        } else {
            values
                .iter()
                .fold(bytes, |bytes, value| bytes.u32(value.to_bits()))
        }
    };
    records.iter().fold(bytes, values).padded().0
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// A record batch, as any Arrow writer makes it.
fn batch(sums: bool, records: &[Record]) -> RecordBatch {
    let keys: Vec<Key> = records.iter().map(|(key, _)| *key).collect();
    let keys = Buffer::from_vec(keys.as_flattened().to_vec());
    let keys: ArrayRef = Arc::new(FixedSizeBinaryArray::new(32, keys, None));
    let lengths = || records.iter().map(|(_, values)| values.len());
    let item = Arc::new(Field::new("item", DataType::Float32, false));
    let (fields, columns): (Vec<Field>, Vec<ArrayRef>) = if sums {
        let tokens: Vec<u32> = lengths().map(|length| length as u32).collect();
        let values: Vec<f64> = records.iter().map(|(_, values)| sum(values)).collect();
        let fields = vec![
            Field::new("tokens", DataType::UInt32, false),
            Field::new("sum", DataType::Float64, false),
        ];
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from(tokens)),
            Arc::new(Float64Array::from(values)),
        ];
        (fields, columns)
    } else {
        let values: Vec<f32> = records
            .iter()
            .flat_map(|(_, values)| values.clone())
            .collect();
        let offsets = OffsetBuffer::from_lengths(lengths());
        let field = Field::new("logps", DataType::List(Arc::clone(&item)), false);
        let list = ListArray::new(item, offsets, Arc::new(Float32Array::from(values)), None);
        (vec![field], vec![Arc::new(list)])
    };
    let key = Field::new("key", DataType::FixedSizeBinary(32), false);
    let kind = if sums { "sums" } else { "per-token" };
    let metadata = HashMap::from([
        ("logratio.fingerprint".to_owned(), hex(&FINGERPRINT)),
        ("logratio.kind".to_owned(), kind.to_owned()),
    ]);
    let fields: Vec<Field> = [vec![key], fields].concat();
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
    RecordBatch::try_new(schema, [vec![keys], columns].concat()).expect("a batch")
}

/// A shard of these batches: an Arrow file with the seal between its data and its footer.
pub fn shard(order: Order, version: u32, sums: bool, batches: &[Vec<Record>]) -> Vec<u8> {
    let arrays: Vec<RecordBatch> = batches.iter().map(|records| batch(sums, records)).collect();
    let options = IpcWriteOptions::try_new(64, false, MetadataVersion::V5).expect("options");
    let mut writer = FileWriter::try_new_with_options(Vec::new(), &arrays[0].schema(), options)
        .expect("a writer");
    for array in &arrays {
        writer.write(array).expect("writes");
    }
    let arrow = writer.into_inner().expect("finishes");
    let length = u32::from_le_bytes(arrow[arrow.len() - 10..][..4].try_into().expect("four"));
    let (data, footer) = arrow.split_at(arrow.len() - 10 - length as usize);
    let data = Bytes(data.to_vec(), order).padded().0;
    let tables = tables(order, sums, &data, &footer[..length as usize]);
    let tokens = batches
        .iter()
        .flatten()
        .map(|(_, values)| values.len() as u64);
    let tail = Bytes(Vec::new(), order)
        .raw(b"LRSHARD1")
        .u32(version)
        .u32(0x0102_0304)
        .raw(&FINGERPRINT)
        .u64(batches.iter().map(Vec::len).sum::<usize>() as u64)
        .u64(tokens.sum())
        .u64(data.len() as u64)
        .u64((data.len() + tables.len() + 128 + footer.len()) as u64)
        .u32(sums.into())
        .u32(batches.len() as u32)
        .u32(crc32c::crc32c(&tables))
        .u32(crc32c::crc32c(footer))
        .zeros(28)
        .signed();
    [&data[..], &tables, &tail, footer].concat()
}

/// The table of batches, read from the Arrow footer, and the checksums of the data.
fn tables(order: Order, sums: bool, data: &[u8], footer: &[u8]) -> Vec<u8> {
    let mut tables = Bytes(Vec::new(), order);
    let footer = root_as_footer(footer).expect("a footer");
    for block in footer.recordBatches().expect("batches") {
        let (at, metadata) = (block.offset() as u64, block.metaDataLength() as u64);
        let message = &data[at as usize + 8..(at + metadata) as usize];
        let message = root_as_message(message).expect("a message");
        let batch = message.header_as_record_batch().expect("a batch");
        let buffers = batch.buffers().expect("columns");
        let start = |buffer: usize| at + metadata + buffers.get(buffer).offset() as u64;
        // Validity and values of the keys; validity and offsets (or counts); validity and values.
        let width = if sums { 8 } else { 4 };
        tables = tables
            .u64(batch.length() as u64)
            .u64(start(1))
            .u64(start(3))
            .u64(start(5))
            .u64(buffers.get(5).length() as u64 / width);
    }
    let crcs = data.chunks(65_536).map(crc32c::crc32c);
    crcs.fold(tables, Bytes::u32).padded().0
}

/// The name of a shard without its ending.
pub fn stem(shard: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(shard)[..16])
}

/// A shard's manifest, with more fields of a later version.
pub fn manifest(
    version: u32,
    sums: bool,
    shard: &[u8],
    rows: usize,
    tokens: usize,
    more: &str,
) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    let footer = u32::from_le_bytes(shard[shard.len() - 10..][..4].try_into().expect("four"));
    let seal = &shard[shard.len() - 10 - footer as usize - 4..][..4];
    let kind = if sums { "sums" } else { "per-token" };
    let body = format!(
        "{{\"format\":\"logratio.cache\",\"version\":{version},\"fingerprint\":\"{}\",\"kind\":\
         \"{kind}\",\"shard\":\"{}.arrow\",\"bytes\":{},\"rows\":{rows},\"tokens\":{tokens},\
         \"sha256\":\"{}\",\"seal\":{}{more}",
        hex(&FINGERPRINT),
        stem(shard),
        shard.len(),
        hex(&Sha256::digest(shard)),
        u32::from_le_bytes(seal.try_into().expect("four")),
    );
    let crc = crc32c::crc32c(body.as_bytes());
    format!("{body},\n  \"crc32c\": \"{crc:08x}\"\n}}\n").into_bytes()
}
