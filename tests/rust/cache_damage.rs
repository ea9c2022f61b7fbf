//! F04 to F07, F17: every bit flipped, every length, holes, exchanges: an error, or a torn tail
//! that is counted, and never a wrong value.

mod damage;
mod sim;

use std::{fs, path::Path};

use damage::{Damaged, FINGERPRINT, Verdict, verdict};
use logratio::{
    Error,
    cache::{Cache, ReadMode, ValueKind},
};
use sim::chance::{Chance, for_seeds};

#[test]
fn every_flipped_bit_is_noticed() {
    let flips = for_seeds(0..12, |seed| {
        let damaged = Damaged::new(if seed % 2 == 0 {
            ValueKind::PerToken
        } else {
            ValueKind::Sums
        });
        let (path, bytes) = &damaged.files[seed as usize / 2];
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            damaged.assert_noticed(path, &flipped, &format!("bit {bit} of {}", path.display()));
        }
        8 * bytes.len() as u64
    });
    assert!(flips > 2 * 8 * 15_000, "only {flips} flips");
}

#[test]
fn every_length_is_noticed() {
    for kind in [ValueKind::PerToken, ValueKind::Sums] {
        let damaged = Damaged::new(kind);
        for (path, bytes) in &damaged.files {
            for length in 0..bytes.len() {
                let what = format!("{length} bytes of {}", path.display());
                damaged.assert_noticed(path, &bytes[..length], &what);
            }
        }
    }
}

#[test]
fn a_cut_shard_says_how_long_it_was() {
    let damaged = Damaged::new(ValueKind::PerToken);
    let (path, bytes) = damaged.ending(".arrow")[0];
    let (Verdict::Refused(error), _) = damaged.with(&[(path, bytes[..1000].to_vec())]) else {
        panic!("not noticed");
    };
    let wanted = format!("it has 1000 bytes, and {} were written", bytes.len());
    assert!(error.to_string().contains(&wanted), "{error}");
}

#[test]
fn bytes_behind_the_end_are_noticed() {
    let mut chance = Chance(5);
    let damaged = Damaged::new(ValueKind::PerToken);
    for (path, bytes) in &damaged.files {
        for length in [1, 7, 63, 64, 65, 127, 128, 512, 4096] {
            let mut garbage = vec![0; length];
            let zero = [&bytes[..], &garbage].concat();
            garbage.fill_with(|| chance.next() as u8);
            let what = format!("{length} bytes behind {}", path.display());
            damaged.assert_noticed(path, &zero, &what);
            damaged.assert_noticed(path, &[&bytes[..], &garbage].concat(), &what);
        }
    }
}

#[test]
fn holes_are_noticed() {
    let damaged = Damaged::new(ValueKind::PerToken);
    let mut noticed = 0;
    for (path, bytes) in &damaged.files {
        for (length, step) in [(64, 64), (512, 512), (4096, 512)] {
            for start in (0..bytes.len()).step_by(step) {
                let mut hole = bytes.clone();
                hole[start..bytes.len().min(start + length)].fill(0);
                if hole != *bytes {
                    let what = format!("a hole of {length} at {start} in {}", path.display());
                    damaged.assert_noticed(path, &hole, &what);
                    noticed += 1;
                }
            }
        }
    }
    assert!(noticed > 200);
}

#[test]
fn exchanged_files_are_refused() {
    let damaged = Damaged::new(ValueKind::PerToken);
    for ending in [".arrow", ".manifest.json"] {
        let [one, other] = damaged.ending(ending)[..] else {
            panic!("there are two");
        };
        let exchanged = [(&*one.0, other.1.clone()), (&*other.0, one.1.clone())];
        let (Verdict::Refused(error), false) = damaged.with(&exchanged) else {
            panic!("exchanged {ending} were not noticed");
        };
        assert!(matches!(error, Error::CorruptCache { .. }), "{error:?}");
    }
}

/// A shard, manifest or journal of another reference, of other values, or of another cache.
#[test]
fn files_of_another_cache_are_refused() {
    let damaged = Damaged::new(ValueKind::PerToken);
    let sums = Damaged::new(ValueKind::Sums);
    for (at, (path, bytes)) in damaged.files.iter().enumerate() {
        damaged.assert_noticed(path, &sums.files[at].1, "a file of sums");
        if bytes.starts_with(b"ARROW1") {
            let other = damaged.ending(".arrow")[usize::from(at == 0)].1.clone();
            damaged.assert_noticed(path, &other, "another shard");
        }
    }
    let other = damaged.cache();
    let other = Cache::new(other.folder(), [8; 32]).on(std::sync::Arc::new(damaged.disk.clone()));
    let error = other.open(ReadMode::Pread).expect_err("another reference");
    assert!(
        error.to_string().contains("belongs to reference 0707"),
        "{error}"
    );
}

#[test]
fn a_missing_shard_is_named_with_its_rows() {
    use logratio::cache::Disk;
    let damaged = Damaged::new(ValueKind::PerToken);
    let path = &damaged.ending(".arrow")[0].0;
    damaged.disk.remove(path).expect("removes");
    let error = damaged
        .cache()
        .open(ReadMode::Pread)
        .expect_err("it is gone");
    let text = error.to_string();
    assert!(
        text.contains("is gone, with 60 completions") && text.contains(".manifest.json"),
        "{text}"
    );
}

fn write_all(folder: &Path, damaged: &Damaged) {
    for (path, bytes) in &damaged.files {
        fs::write(folder.join(path.file_name().expect("a name")), bytes).expect("writes");
    }
}

/// The same on real files that are mapped: an error, and no signal.
#[test]
fn flipped_bits_of_mapped_files_are_noticed() {
    let damaged = Damaged::new(ValueKind::PerToken);
    let mut chance = Chance(11);
    for _ in 0..600 {
        let folder = tempfile::tempdir().expect("folder");
        write_all(folder.path(), &damaged);
        let (path, bytes) = damaged.ending(".arrow")[chance.below(2)];
        let mut bytes = bytes.clone();
        let bit = chance.below(8 * bytes.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
        let end = if chance.flip() {
            bytes.len()
        } else {
            chance.below(bytes.len())
        };
        fs::write(
            folder.path().join(path.file_name().expect("a name")),
            &bytes[..end],
        )
        .expect("writes");
        let opened = Cache::new(folder.path(), FINGERPRINT).open(ReadMode::Map);
        let Verdict::Refused(error) = verdict(opened) else {
            panic!("bit {bit}, length {end} was not noticed");
        };
        assert!(matches!(error, Error::CorruptCache { .. }), "{error:?}");
    }
}

/// F17: with `ReadMode::Pread` a shard that is cut while it is open is an error at every length.
#[test]
fn a_shard_that_is_cut_while_it_is_open_is_an_error() {
    let damaged = Damaged::new(ValueKind::PerToken);
    let folder = tempfile::tempdir().expect("folder");
    let mut chance = Chance(3);
    for _ in 0..100 {
        write_all(folder.path(), &damaged);
        let (path, bytes) = damaged.ending(".arrow")[0];
        let opened = Cache::new(folder.path(), FINGERPRINT)
            .open(ReadMode::Pread)
            .expect("whole");
        // Somewhere in the only block of data, before what is read first.
        let length = chance.below(bytes.len() / 3) as u64;
        let file = folder.path().join(path.file_name().expect("a name"));
        let cut = fs::File::options()
            .write(true)
            .open(&file)
            .and_then(|file| file.set_len(length));
        cut.expect("cuts");
        let Verdict::Refused(error) = verdict(Ok(opened)) else {
            panic!("cut to {length} bytes, and not noticed");
        };
        assert!(
            error
                .to_string()
                .contains(&format!("cut to {length} bytes")),
            "{error}"
        );
    }
}
