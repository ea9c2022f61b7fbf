//! Whatever happens to a journal is an error or a counted torn tail: never a wrong value, never a
//! lost acknowledgement.

mod journals;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    sync::LazyLock,
    thread,
    time::Duration,
};

use journals::{
    HEADER, append, assert_corrupt, block, contents, create, folder_of, journal, key, model, open,
    open_bytes,
};
use logratio::Error;
use proptest::{collection::vec, prelude::*};
use tempfile::tempdir;

proptest! {
    /// A power loss leaves any mixture behind the last durable block: kept, zeroed, garbage.
    #[test]
    fn survives_any_unsynced_tail(
        kept in 0usize..5,
        garbage in vec(prop_oneof![Just(0u8), any::<u8>()], 0..700),
        partly in 0usize..400,
    ) {
        static JOURNAL: LazyLock<(Vec<u8>, Vec<usize>)> = LazyLock::new(|| journal(5));
        let (bytes, ends) = &*JOURNAL;
        let end = if kept == 0 { HEADER } else { ends[kept - 1] };
        let next = &bytes[end..(end + partly).min(ends[kept] - HEADER)]; // its values never came
        let mut bytes = [&bytes[..end], next].concat();
        bytes.extend(&garbage);
        let reader = open_bytes(&bytes).expect("a torn tail");
        prop_assert_eq!(reader.torn_bytes(), (bytes.len() - end) as u64);
        prop_assert_eq!(reader.len(), 2 * kept);
    }
}

#[test]
fn a_cut_at_every_byte_keeps_the_blocks_before() {
    let (bytes, ends) = journal(4);
    for length in 0..bytes.len() {
        let whole = ends.iter().filter(|&&end| end <= length).count();
        let last = ends[..whole].last().copied().unwrap_or(HEADER.min(length));
        let last = if length < HEADER { 0 } else { last };
        let folder = folder_of(&[&bytes[..length]]);
        let reader = open(folder.path()).expect("a torn tail");
        assert_eq!(
            reader.torn_bytes(),
            (length - last) as u64,
            "cut to {length}"
        );
        assert_eq!(contents(&reader, (0..8).map(key)), model(whole as u64));
    }
}

/// Creating a journal syncs its header before anything else: a power loss may leave only zeros.
#[test]
fn a_journal_that_was_never_begun_is_a_torn_tail() {
    let (bytes, _) = journal(0);
    assert_eq!(bytes.len(), HEADER);
    for torn in [&[][..], &[0; 10], &[0; HEADER], &bytes[..HEADER - 1]] {
        let reader = open_bytes(torn).expect("nothing was lost");
        assert_eq!(reader.torn_bytes(), torn.len() as u64);
    }
    assert_eq!(open_bytes(&bytes).expect("empty").torn_bytes(), 0);
    assert_corrupt(open_bytes(&[0; HEADER + 1]), "LRJOURN1");
}

#[test]
fn every_flipped_bit_is_refused_or_a_torn_tail() {
    let (bytes, ends) = journal(3);
    let folder = folder_of(&[&bytes]);
    let path = folder.path().join("0.journal");
    let file = fs::File::options().write(true).open(path).expect("opens");
    for bit in 0..bytes.len() * 8 {
        let (byte, at) = (bytes[bit / 8], bit as u64 / 8);
        file.write_all_at(&[byte ^ 1 << (bit % 8)], at)
            .expect("flips");
        assert_flip_is_found(folder.path(), bit / 8, &ends);
        file.write_all_at(&[byte], at).expect("flips back");
    }
}

fn assert_flip_is_found(folder: &Path, byte: usize, ends: &[usize]) {
    match open(folder) {
        Ok(reader) => {
            assert!(
                byte >= ends[1],
                "byte {byte} of an earlier block went unnoticed"
            );
            assert_eq!(reader.torn_bytes(), (ends[2] - ends[1]) as u64);
            assert_eq!(contents(&reader, (0..6).map(key)), model(2));
        }
        Err(error) => {
            assert!(byte < ends[1], "byte {byte} of the last block: {error}");
            assert!(matches!(error, Error::CorruptCache { .. }), "{error:?}");
        }
    }
}

#[test]
fn blocks_that_are_missing_moved_or_foreign_are_refused() {
    let (bytes, ends) = journal(3);
    let (other, _) = journal(3);
    let without = |from: usize, to: usize| [&bytes[..from], &bytes[to..]].concat();
    assert_corrupt(open_bytes(&without(ends[0], ends[1])), "block 1 at byte");
    assert_corrupt(open_bytes(&without(HEADER, ends[0])), "block 0 at byte 64");
    let swapped = [
        &bytes[..ends[0]],
        &bytes[ends[1]..],
        &bytes[ends[0]..ends[1]],
    ]
    .concat();
    assert_corrupt(open_bytes(&swapped), "is damaged");
    let twice = [&bytes[..], &bytes[ends[1]..]].concat();
    assert_corrupt(open_bytes(&twice), "is damaged");
    let hole = [&bytes[..ends[0]], &[0; 4096], &bytes[ends[0]..]].concat();
    assert_corrupt(open_bytes(&hole), "is damaged");
    let exchanged = [&bytes[..ends[0]], &other[ends[0]..]].concat();
    let reader = open_bytes(&exchanged).expect("bytes of another journal are garbage at the end");
    assert_eq!(
        (reader.len(), reader.torn_bytes()),
        (2, (ends[2] - ends[0]) as u64)
    );
}

#[test]
fn a_block_that_follows_another_history_is_not_taken() {
    let (mut bytes, ends) = journal(2);
    bytes[ends[0] + 36] ^= 1; // the checksum of the block before
    reseal(&mut bytes[ends[0]..]);
    let reader = open_bytes(&bytes).expect("a torn tail");
    assert_eq!(
        (reader.len(), reader.torn_bytes()),
        (2, (ends[1] - ends[0]) as u64)
    );
}

/// The scan for later blocks works in pieces; a header behind the first piece counts too.
#[test]
fn damage_is_found_far_before_the_next_block() {
    let folder = tempdir().expect("folder");
    let mut writer = create(folder.path());
    append(&mut writer, &[(key(0), vec![-1.0; 700_000])]).expect("appends");
    append(&mut writer, &block(1)).expect("appends");
    let mut bytes = fs::read(writer.path()).expect("reads");
    bytes[HEADER + 1] ^= 1; // the first block's header: its length is lost
    assert_corrupt(open_bytes(&bytes), "block 0 at byte 64 is damaged");
}

#[test]
fn a_foreign_journal_is_refused_by_name() {
    let (bytes, _) = journal(1);
    let changed = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = bytes.clone();
        change(&mut bytes[..HEADER]);
        let crc = crc32c::crc32c(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
        open_bytes(&bytes)
    };
    assert_corrupt(changed(&|header| header[0] = b'X'), "LRJOURN1");
    assert_corrupt(changed(&|header| header[8] = 2), "version 2 never held");
    assert_corrupt(changed(&|header| header[8] = 3), "format version 3");
    assert_corrupt(changed(&|header| header[56] = 1), "sums values");
    assert_corrupt(changed(&|header| header[12..16].reverse()), "big-endian");
    assert_corrupt(
        changed(&|header| header[16] = 8),
        "belongs to reference 0807",
    );
}

#[test]
fn values_that_are_no_log_probs_are_refused_when_written_and_when_read() {
    let folder = tempdir().expect("folder");
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0011, 1.0] {
        let mut writer = create(folder.path());
        let error = append(&mut writer, &[(key(1), vec![-1.0, value])]).expect_err("refused");
        assert!(matches!(error, Error::CorruptCache { .. }), "{error:?}");
        append(&mut writer, &[(key(1), vec![-1.0, 0.001])]).expect("still usable");
        let mut bytes = fs::read(writer.path()).expect("reads");
        let at = bytes
            .windows(4)
            .position(|four| four == 0.001f32.to_le_bytes())
            .expect("there");
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        reseal(&mut bytes[HEADER..]);
        assert_corrupt(open_bytes(&bytes), "log-prob");
    }
}

/// Makes the checksums of a block match.
fn reseal(block: &mut [u8]) {
    let crc = crc32c::crc32c(&block[HEADER..]);
    block[40..44].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&block[..HEADER - 4]);
    block[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_block_whose_records_do_not_fill_it_is_refused() {
    let (bytes, _) = journal(1);
    for (at, value) in [
        (HEADER + 32, 3u8),
        (HEADER + 32, 1),
        (2 * HEADER + 64, 0),
        (2 * HEADER + 67, 9),
    ] {
        let mut bytes = bytes.clone();
        assert_ne!(bytes[at], value);
        bytes[at] = value;
        reseal(&mut bytes[HEADER..]);
        assert_corrupt(open_bytes(&bytes), "its records do not fill it");
    }
}

#[test]
fn a_file_changed_after_it_was_opened_is_refused() {
    let (bytes, ends) = journal(2);
    let folder = folder_of(&[&bytes]);
    let reader = open(folder.path()).expect("opens");
    let path = folder.path().join("0.journal");
    let row = reader.join(&[key(2)]).expect("joins");
    fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(ends[0] as u64))
        .expect("cuts");
    assert!(
        reader
            .read(&row)
            .expect_err("cut")
            .to_string()
            .contains("cut after")
    );
    fs::write(&path, vec![255; bytes.len()]).expect("writes"); // every value is a NaN
    assert!(matches!(reader.read(&row), Err(Error::CorruptCache { .. })));
}

const CHILD: &str = "LOGRATIO_TEST_CACHE_FOLDER";

/// Not a test by itself: the child of the next one.
#[test]
fn appends_until_it_is_killed() {
    let Ok(folder) = std::env::var(CHILD) else {
        return;
    };
    let mut writer = create(Path::new(&folder));
    let mut acknowledge = std::io::stdout();
    let start = u64::from(std::process::id()) << 32;
    for number in start.. {
        append(&mut writer, &block(number)).expect("appends");
        writeln!(acknowledge, "acknowledged {number}").expect("the parent listens");
    }
}

/// A real `kill -9` at any moment loses no acknowledged block and invents none.
#[test]
fn kill_minus_nine_loses_nothing_that_was_acknowledged() {
    let folder = tempdir().expect("folder");
    let mut acknowledged = Vec::new();
    for round in 0..30 {
        acknowledged.extend(killed_after(
            folder.path(),
            Duration::from_micros(300 * round),
        ));
    }
    assert!(acknowledged.len() > 30, "the children came to write");
    let reader = open(folder.path()).expect("at most torn tails");
    for number in acknowledged {
        for (key, values) in block(number) {
            assert_eq!(
                reader
                    .read(&reader.join(&[key]).expect("joins"))
                    .expect("not lost")
                    .1,
                values
            );
        }
    }
}

/// Runs the child until a while after its first block; the blocks that it acknowledged.
fn killed_after(folder: &Path, time: Duration) -> Vec<u64> {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "--nocapture", "appends_until_it_is_killed"])
        .env(CHILD, folder)
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let number = |line: std::io::Result<String>| -> Option<u64> {
        // A line that the kill cut short has no end, but then its block was not acknowledged.
        line.ok()?.strip_prefix("acknowledged ")?.parse().ok()
    };
    let first = lines.by_ref().find_map(number).expect("a first block");
    thread::sleep(time);
    child.kill().expect("kills");
    child.wait().expect("ends");
    [first]
        .into_iter()
        .chain(lines.filter_map(number))
        .collect()
}
