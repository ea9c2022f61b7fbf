//! F20: files that no accident makes, whose checksums are right all the same. Whatever they say,
//! nothing panics, hangs or takes more memory than the files have.
//!
//! Run longer with `LOGRATIO_FORGERIES=100`, which is how many times as many. For a fuzzer that is
//! led by coverage, call `touch` from a `cargo fuzz` target.

mod frozen;
mod sim;

use std::{fs, sync::Arc};

use frozen::{FINGERPRINT, Order, Record, journal, manifest, records, shard};
use logratio::{
    Error, Result,
    cache::{Cache, ReadMode, ValueKind},
};
use sim::{
    SimDisk,
    chance::{Chance, for_seeds, times},
};

const CASES: usize = 100_000;
const NAME: &str = "0123456789abcdef0123456789abcdef";
/// Numbers that break arithmetic.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    63,
    64,
    65,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 40,
    1 << 58,
    1 << 61,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Asks everything of a cache with these files; what is refused is refused as corrupt.
fn touch(sums: bool, files: &[(String, Vec<u8>)]) -> bool {
    let kind = if sums {
        ValueKind::Sums
    } else {
        ValueKind::PerToken
    };
    let disk = SimDisk::with("/cache".as_ref(), files);
    let cache = Cache::new("/cache", FINGERPRINT)
        .with_kind(kind)
        .on(Arc::new(disk));
    let read = || -> Result<()> {
        let reader = cache.open(ReadMode::Pread)?;
        let keys: Vec<_> = (0..9).map(|number| [number; 32]).collect();
        let rows = reader.join(&keys)?;
        let rows: Vec<i64> = rows.into_iter().filter(|row| *row >= 0).collect();
        let _ = (
            reader.tokens(),
            reader.bytes(),
            reader.torn_bytes(),
            reader.len(),
        );
        reader.lengths(&rows)?;
        reader.read_sums(&rows)?;
        if !sums {
            reader.read(&rows)?;
        }
        reader.slice(None, 5)?;
        reader.distinct().map(drop)
    };
    let read = read();
    let _ = cache.verify().expect("says what is wrong");
    for result in [read.as_ref().err(), cache.compact(true).err().as_ref()]
        .into_iter()
        .flatten()
    {
        assert!(matches!(result, Error::CorruptCache { .. }), "{result:?}");
    }
    read.is_ok()
}

/// One to three wounds in some of the bytes.
fn wound(bytes: &mut [u8], chance: &mut Chance) {
    for _ in 0..=chance.below(3) {
        let number = match chance.below(3) {
            0 => chance.next(),
            1 => chance.below(bytes.len() + 2) as u64,
            _ => NUMBERS[chance.below(NUMBERS.len())],
        };
        let width = [1, 4, 8][chance.below(3)];
        let at = chance.below(bytes.len() / 4) * 4;
        let end = bytes.len().min(at + width);
        bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
    }
}

fn sign(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight"))
}

/// Makes every checksum of a journal right, as far as its lengths lead.
fn sign_journal(bytes: &mut [u8], chain: bool) {
    sign(&mut bytes[..64]);
    let mut at = 64;
    while at + 64 <= bytes.len() {
        let previous = bytes[60..64].to_vec();
        let payload = usize::try_from(u64_at(bytes, at + 24)).ok();
        let end = payload.and_then(|payload| payload.checked_add(at + 64));
        let end = end.filter(|&end| end <= bytes.len()).unwrap_or(bytes.len());
        let crc = crc32c::crc32c(&bytes[at + 64..end]);
        bytes[at + 40..at + 44].copy_from_slice(&crc.to_le_bytes());
        if chain && at == 64 {
            bytes[at + 36..at + 40].copy_from_slice(&previous);
        }
        sign(&mut bytes[at..at + 64]);
        let own = bytes[at + 60..at + 64].to_vec();
        if chain && end + 64 <= bytes.len() {
            bytes[end + 36..end + 40].copy_from_slice(&own);
        }
        at = end;
    }
}

fn assert_some_are_read(read: u64, cases: u64) {
    assert!(
        read > cases / 100,
        "only {read} of {cases} forgeries came behind the checksums"
    );
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    if let Some(kilobytes) = peak.and_then(|peak| peak.split_whitespace().next()) {
        let kilobytes: u64 = kilobytes.parse().expect("a number");
        assert!(
            kilobytes < 2 << 20,
            "{kilobytes} kB: a forged length was believed"
        );
    }
}

fn cases() -> usize {
    CASES * times("LOGRATIO_FORGERIES", 1)
}

#[test]
fn forged_journals_are_refused_or_read() {
    let blocks: Vec<Vec<Record>> = (0..3).map(records).collect();
    let valid = [false, true].map(|sums| journal(Order::Little, sums, &blocks));
    let read = for_seeds(0..cases(), |seed| {
        let mut chance = Chance(seed);
        let sums = chance.flip();
        let mut bytes = valid[usize::from(sums)].clone();
        match chance.below(4) {
            0 => wound(&mut bytes[..64], &mut chance),
            1 => wound(&mut bytes[64..128], &mut chance),
            _ => wound(&mut bytes[64..], &mut chance),
        }
        if chance.below(4) == 0 {
            bytes.truncate(64 + chance.below(bytes.len() - 64));
        }
        sign_journal(&mut bytes, chance.below(4) > 0);
        touch(sums, &[("host-1-2.journal".into(), bytes)]).into()
    });
    assert_some_are_read(read, cases() as u64);
}

/// Makes every checksum of a shard right: those of the data, of the tables, of the footer and of
/// the tail. `data` and `footer` are what they were when the shard was whole.
fn sign_shard(bytes: &mut [u8], data: usize, footer: usize) {
    let tail = bytes.len() - footer - 128;
    let crcs = data + 2 * 40;
    for (at, start) in (0..data).step_by(65_536).enumerate() {
        let crc = crc32c::crc32c(&bytes[start..data.min(start + 65_536)]);
        bytes[crcs + 4 * at..][..4].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32c::crc32c(&bytes[data..tail]);
    bytes[tail + 88..tail + 92].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[tail + 128..]);
    bytes[tail + 92..tail + 96].copy_from_slice(&crc.to_le_bytes());
    sign(&mut bytes[tail..tail + 128]);
}

#[test]
fn forged_shards_are_refused_or_read() {
    let batches = [
        [records(0), records(1)].concat(),
        [records(2), records(3)].concat(),
    ];
    let valid = [false, true].map(|sums| shard(Order::Little, 1, sums, &batches));
    let read = for_seeds(0..cases(), |seed| {
        let mut chance = Chance(seed);
        let sums = chance.flip();
        let mut bytes = valid[usize::from(sums)].clone();
        let tail = bytes
            .windows(8)
            .rposition(|eight| eight == b"LRSHARD1")
            .expect("a tail");
        let data = u64_at(&bytes, tail + 64) as usize;
        let footer = bytes.len() - tail - 128;
        match chance.below(4) {
            0 => wound(&mut bytes[tail + 8..tail + 96], &mut chance),
            1 => wound(&mut bytes[..data], &mut chance),
            _ => wound(&mut bytes[data..tail], &mut chance),
        }
        sign_shard(&mut bytes, data, footer);
        if chance.below(8) == 0 {
            // The rows of the tail follow those of the batches.
            let rows = [0, 40].map(|at| u64_at(&bytes, data + at));
            let rows = rows[0].wrapping_add(rows[1]).to_le_bytes();
            bytes[tail + 48..tail + 56].copy_from_slice(&rows);
            sign_shard(&mut bytes, data, footer);
        }
        let rows = u64_at(&bytes, tail + 48) as usize;
        touch(sums, &shard_and_manifest(sums, bytes, rows)).into()
    });
    assert_some_are_read(read, cases() as u64);
}

fn shard_and_manifest(sums: bool, bytes: Vec<u8>, rows: usize) -> [(String, Vec<u8>); 2] {
    let manifest = manifest(1, sums, &bytes, rows, 15, "");
    let text = String::from_utf8(manifest).expect("text");
    let own = format!("{}.arrow", frozen::stem(&bytes));
    let manifest = sign_manifest(&text.replace(&own, &format!("{NAME}.arrow")));
    [
        (format!("{NAME}.arrow"), bytes),
        (format!("{NAME}.manifest.json"), manifest),
    ]
}

fn sign_manifest(text: &str) -> Vec<u8> {
    let body = text.rsplit_once(",\n").map_or(text, |(body, _)| body);
    let crc = crc32c::crc32c(body.as_bytes());
    format!("{body},\n  \"crc32c\": \"{crc:08x}\"\n}}\n").into_bytes()
}

/// What may stand where a manifest has something else.
const WORDS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "2",
    "1e999",
    "18446744073709551615",
    "18446744073709551616",
    "null",
    "\"\"",
    "[]",
    "{}",
    "\"../../x.arrow\"",
    "\"a/b.arrow\"",
    "\".arrow\"",
    "\"\\u0000.arrow\"",
    "true",
    ",",
    "\"sums\"",
];

#[test]
fn forged_manifests_are_refused_or_read() {
    let bytes = shard(Order::Little, 1, false, &[records(0)]);
    let valid = shard_and_manifest(false, bytes, 2);
    let text = String::from_utf8(valid[1].1.clone()).expect("text");
    let fields: Vec<&str> = text
        .rsplit_once(",\n")
        .expect("a checksum")
        .0
        .split(',')
        .collect();
    let read = for_seeds(0..cases(), |seed| {
        let mut chance = Chance(seed);
        let mut fields: Vec<String> = fields.iter().map(|&field| field.into()).collect();
        for _ in 0..=chance.below(2) {
            let at = chance.below(fields.len());
            match chance.below(6) {
                0 => drop(fields.remove(at)),
                1 => fields.insert(at, fields[chance.below(fields.len())].clone()),
                2 => fields.insert(at, format!("\"x\":{}", "[".repeat(chance.below(2000)))),
                3 => fields.push(format!("\"y\":{}", WORDS[chance.below(WORDS.len())])),
                4 => fields[at].truncate(1 + chance.below(8)),
                _ => {
                    let word = WORDS[chance.below(WORDS.len())];
                    let name = fields[at].split(':').next().expect("one").to_owned();
                    fields[at] = format!("{name}:{word}");
                }
            }
            if fields.is_empty() {
                break;
            }
        }
        let manifest = sign_manifest(&format!("{},\n", fields.join(",")));
        touch(false, &[valid[0].clone(), (valid[1].0.clone(), manifest)]).into()
    });
    assert_some_are_read(read, cases() as u64);
}
