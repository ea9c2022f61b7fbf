//! F11, F13, one call at a time: somebody writes, seals, compacts or merges, and at the moment of
//! each of its calls to the disk somebody else does one of these things from beginning to end.
//!
//! Stress on real files (`cache_writers.rs`) meets such moments seldom; here it is every one.

mod sim;

use std::{
    io::ErrorKind,
    sync::{Arc, Mutex},
};

use logratio::{
    Error, Result,
    cache::{Cache, CacheWriter, ReadMode, ValueKind},
};
use sim::{
    SimDisk,
    chance::for_seeds,
    life::FOLDERS,
    records::{append, assert_values, key},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Write,
    Seal,
    Compact,
    Merge,
    /// Reads everything.
    Read,
}

const ACTS: [Act; 5] = [Act::Write, Act::Seal, Act::Compact, Act::Merge, Act::Read];

/// What each cache must hold.
type Acknowledged = Arc<Mutex<Vec<usize>>>;

fn cache(disk: &SimDisk, folder: usize) -> Cache {
    Cache::new(FOLDERS[folder], [7; 32]).on(Arc::new(disk.clone()))
}

/// A shard, a dead writer's journal and a journal that is written, and another cache.
fn start(disk: &SimDisk) -> (Acknowledged, CacheWriter) {
    let acknowledged = Acknowledged::default();
    write(disk, 0, &[0, 1], &acknowledged)
        .expect("writes")
        .seal()
        .expect("seals");
    drop(write(disk, 0, &[2, 3], &acknowledged).expect("writes"));
    let other = Acknowledged::default();
    drop(write(disk, 1, &[4, 5], &other).expect("writes"));
    let living = write(disk, 0, &[6, 7], &acknowledged).expect("writes");
    (acknowledged, living)
}

fn write(
    disk: &SimDisk,
    folder: usize,
    numbers: &[usize],
    acknowledged: &Acknowledged,
) -> Result<CacheWriter> {
    let mut writer = cache(disk, folder).writer()?;
    append(&mut writer, ValueKind::PerToken, numbers)?;
    acknowledged.lock().expect("no panic").extend(numbers);
    Ok(writer)
}

/// Whoever writes writes these records, so that two that do seal the same bytes: new ones, or those
/// of the shard that is there.
const WRITTEN: [[usize; 2]; 2] = [[8, 9], [0, 1]];

fn act(disk: &SimDisk, act: Act, new: [usize; 2], acknowledged: &Acknowledged) -> Result<()> {
    match act {
        Act::Write => write(disk, 0, &new, acknowledged).map(drop),
        Act::Seal => write(disk, 0, &new, acknowledged)?.seal().map(drop),
        Act::Compact => cache(disk, 0).compact(false).map(drop),
        Act::Merge => {
            cache(disk, 0).merge(&[cache(disk, 1)])?;
            acknowledged.lock().expect("no panic").extend([4, 5]);
            Ok(())
        }
        Act::Read => {
            let known = acknowledged.lock().expect("no panic").clone();
            check(disk, &known);
            Ok(())
        }
    }
}

/// Everything is there, with its values.
fn check(disk: &SimDisk, known: &[usize]) {
    let reader = cache(disk, 0)
        .open(ReadMode::Pread)
        .expect("a consistent snapshot");
    let keys: Vec<_> = known.iter().copied().map(key).collect();
    let rows = reader.join(&keys).expect("joins");
    for (number, row) in known.iter().zip(&rows) {
        assert!(*row >= 0, "record {number} is lost");
    }
    assert_values(&reader, known, &rows);
}

/// Whoever finds what it is at tidied away says so; nothing is lost, and it may try again.
fn assert_gone(result: &Result<()>) {
    match result {
        Ok(()) => {}
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
        Err(error) => panic!("{error}"),
    }
}

/// One act, and others at the moment of one of its calls; whether it had so many calls.
fn interleave(new: [usize; 2], one: Act, others: &[Act], at: usize) -> bool {
    let disk = SimDisk::default();
    let (acknowledged, living) = start(&disk);
    let (known, there, all) = (acknowledged.clone(), disk.clone(), others.to_vec());
    disk.interrupt(at, move || {
        for other in all {
            assert_gone(&act(&there, other, new, &known));
        }
    });
    assert_gone(&act(&disk, one, new, &acknowledged));
    let reached = !disk.forget_interrupt();
    let known = acknowledged.lock().expect("no panic").clone();
    check(&disk, &known);
    drop(living);
    cache(&disk, 0).compact(false).expect("compacts");
    check(&disk, &known);
    let report = cache(&disk, 0).verify().expect("verifies");
    assert!(
        report.is_whole() && report.leftovers.is_empty(),
        "{report:?}"
    );
    assert_eq!(report.parts.len(), 1);
    reached
}

#[test]
fn whatever_somebody_else_does_meanwhile_nothing_is_lost() {
    let moments = for_seeds(0..ACTS.len(), |one| {
        let mut moments = 0;
        for new in WRITTEN {
            for second in ACTS {
                for third in [None, Some(Act::Compact), Some(Act::Seal), Some(Act::Write)] {
                    let others: Vec<Act> = [Some(second), third].into_iter().flatten().collect();
                    let mut at = 0;
                    while interleave(new, ACTS[one as usize], &others, at) {
                        at += 1;
                    }
                    moments += at as u64;
                }
            }
        }
        moments
    });
    assert!(moments > 5_000, "only {moments} moments");
}
