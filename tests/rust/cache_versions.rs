//! F15, F16: files of version 1 are read for ever, files of later versions and of machines of the
//! other byte order are refused by name.
//!
//! F14: nothing in the cache reads a clock, so none can be set wrong; order is that of blocks in a
//! journal, of names and of keys. The last test says so of the source.

mod frozen;
mod sim;

use std::{fs, path::Path, sync::Arc};

use frozen::{FINGERPRINT, Order, Record, journal, manifest, records, shard, stem, sum};
use logratio::{
    Error, Result,
    cache::{Cache, CacheReader, ReadMode, ValueKind},
    content_key::Key,
};
use sim::SimDisk;

const FOLDER: &str = "/cache";

fn cache(sums: bool, files: &[(String, Vec<u8>)]) -> Cache {
    let kind = if sums {
        ValueKind::Sums
    } else {
        ValueKind::PerToken
    };
    let disk = SimDisk::with(FOLDER.as_ref(), files);
    Cache::new(FOLDER, FINGERPRINT)
        .with_kind(kind)
        .on(Arc::new(disk))
}

fn open(sums: bool, files: &[(String, Vec<u8>)]) -> Result<CacheReader> {
    cache(sums, files).open(ReadMode::Pread)
}

fn refusal(sums: bool, files: &[(String, Vec<u8>)]) -> String {
    let error = open(sums, files).expect_err("refused");
    assert!(matches!(error, Error::CorruptCache { .. }), "{error:?}");
    error.to_string()
}

fn named(bytes: Vec<u8>, more: &str) -> [(String, Vec<u8>); 2] {
    let all: Vec<Record> = (0..4).flat_map(records).collect();
    let tokens = all.iter().map(|(_, values)| values.len()).sum();
    let sums = bytes.windows(4).any(|four| four == b"sums");
    let manifest = manifest(1, sums, &bytes, all.len(), tokens, more);
    let stem = stem(&bytes);
    [
        (format!("{stem}.arrow"), bytes),
        (format!("{stem}.manifest.json"), manifest),
    ]
}

fn shard_of(order: Order, version: u32, sums: bool) -> Vec<u8> {
    let batches = [
        [records(0), records(1)].concat(),
        [records(2), records(3)].concat(),
    ];
    shard(order, version, sums, &batches)
}

fn assert_holds(reader: &CacheReader, sums: bool, wanted: &[Record]) {
    let keys: Vec<Key> = wanted.iter().map(|(key, _)| *key).collect();
    let rows = reader.join(&keys).expect("joins");
    assert_eq!(reader.len(), wanted.len());
    let (tokens, found) = reader.read_sums(&rows).expect("reads");
    for (at, (_, values)) in wanted.iter().enumerate() {
        assert_eq!(
            (tokens[at] as usize, found[at]),
            (values.len(), sum(values))
        );
    }
    if !sums {
        let wanted: Vec<f32> = wanted
            .iter()
            .flat_map(|(_, values)| values.clone())
            .collect();
        assert_eq!(reader.read(&rows).expect("reads").1, wanted);
    }
}

#[test]
fn journals_of_version_one_are_read() {
    for sums in [false, true] {
        let blocks: Vec<Vec<Record>> = (0..4).map(records).collect();
        let bytes = journal(Order::Little, sums, &blocks);
        let reader = open(sums, &[("host-1-2.journal".into(), bytes)]).expect("opens");
        assert_eq!(reader.torn_bytes(), 0);
        assert_holds(&reader, sums, &blocks.concat());
    }
}

#[test]
fn shards_of_version_one_are_read() {
    for sums in [false, true] {
        let cache = cache(sums, &named(shard_of(Order::Little, 1, sums), ""));
        let report = cache.verify().expect("verifies");
        assert!(report.is_whole(), "{report:?}");
        let wanted: Vec<Record> = (0..4).flat_map(records).collect();
        assert_holds(&cache.open(ReadMode::Pread).expect("opens"), sums, &wanted);
    }
}

/// The other way round: the frozen encoder makes the bytes that the library writes.
#[test]
fn the_library_writes_version_one() {
    for sums in [false, true] {
        let folder = tempfile::tempdir().expect("folder");
        let kind = if sums {
            ValueKind::Sums
        } else {
            ValueKind::PerToken
        };
        let mut writer = Cache::new(folder.path(), FINGERPRINT)
            .with_kind(kind)
            .writer()
            .expect("creates");
        let records = [records(0), records(1)].concat();
        let keys: Vec<Key> = records.iter().map(|(key, _)| *key).collect();
        let lengths: Vec<u32> = records
            .iter()
            .map(|(_, values)| values.len() as u32)
            .collect();
        if sums {
            let sums: Vec<f64> = records.iter().map(|(_, values)| sum(values)).collect();
            writer.append_sums(&keys, &lengths, &sums).expect("appends");
        } else {
            let mut offsets = vec![0];
            offsets.extend(lengths.iter().scan(0, |end, &length| {
                *end += i64::from(length);
                Some(*end)
            }));
            let values: Vec<f32> = records
                .iter()
                .flat_map(|(_, values)| values.clone())
                .collect();
            writer.append(&keys, &offsets, &values).expect("appends");
        }
        let found = fs::read(writer.path()).expect("reads");
        let wanted = journal(Order::Little, sums, std::slice::from_ref(&records));
        assert_eq!(found.len(), wanted.len());
        assert_eq!(found[..48], wanted[..48]);
        assert_eq!(found[128..], wanted[128..], "the payload");
        let name = writer.seal().expect("seals").expect("a shard");
        let found = fs::read(folder.path().join(&name)).expect("reads");
        let wanted = shard(Order::Little, 1, sums, &[records]);
        assert_eq!(found.len(), wanted.len());
        // Arrow writes the schema's metadata in any order; the keys and values are the same bytes.
        let tail = |bytes: &[u8]| {
            let at = bytes
                .windows(8)
                .rposition(|eight| eight == b"LRSHARD1")
                .expect("a tail");
            bytes[at - 128..at + 88].to_vec()
        };
        assert_eq!(tail(&found)[128..], tail(&wanted)[128..]);
        assert_eq!(
            tail(&found)[..40],
            tail(&wanted)[..40],
            "the table of batches"
        );
    }
}

#[test]
fn unknown_fields_of_a_manifest_are_passed_over() {
    let more = ",\"colour\":\"green\",\"more\":{\"list\":[1,2,{\"x\":null}]}";
    let reader = open(false, &named(shard_of(Order::Little, 1, false), more)).expect("opens");
    assert_holds(
        &reader,
        false,
        &(0..4).flat_map(records).collect::<Vec<_>>(),
    );
}

#[test]
fn a_later_version_is_refused_by_name() {
    let mut bytes = journal(Order::Little, false, &[records(0)]);
    bytes[8] = 9;
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    let text = refusal(false, &[("host-1-2.journal".into(), bytes)]);
    assert!(
        text.contains("format version 9, this library reads 1 to 2"),
        "{text}"
    );

    let text = refusal(false, &named(shard_of(Order::Little, 9, false), ""));
    assert!(
        text.contains("shard version 9, this library reads 1"),
        "{text}"
    );

    // Whatever else became of the fields.
    let bytes = shard_of(Order::Little, 1, false);
    let stem = stem(&bytes);
    let body = r#"{"format":"logratio.cache","version":9,"parts":[]"#;
    let crc = crc32c::crc32c(body.as_bytes());
    let manifest = format!("{body},\n  \"crc32c\": \"{crc:08x}\"\n}}\n").into_bytes();
    let files = [
        (format!("{stem}.arrow"), bytes),
        (format!("{stem}.manifest.json"), manifest),
    ];
    let text = refusal(false, &files);
    assert!(
        text.contains("logratio.cache version 9, this library reads 1"),
        "{text}"
    );
}

#[test]
fn files_of_a_big_endian_machine_are_refused_by_name() {
    for sums in [false, true] {
        let bytes = journal(Order::Big, sums, &[records(0), records(1)]);
        let text = refusal(sums, &[("host-1-2.journal".into(), bytes)]);
        assert!(text.contains("written on a big-endian machine"), "{text}");
        let text = refusal(sums, &named(shard_of(Order::Big, 1, sums), ""));
        assert!(text.contains("written on a big-endian machine"), "{text}");
    }
}

#[test]
fn no_clock_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("rust/cache");
    let mut files = 0;
    for entry in fs::read_dir(folder).expect("the source") {
        let path = entry.expect("a file").path();
        let text = fs::read_to_string(&path).expect("text");
        for clock in [
            "SystemTime",
            "Instant",
            "UNIX_EPOCH",
            "modified()",
            "accessed()",
            "created()",
        ] {
            assert!(!text.contains(clock), "{} reads {clock}", path.display());
        }
        files += 1;
    }
    assert!(files > 10);
}
