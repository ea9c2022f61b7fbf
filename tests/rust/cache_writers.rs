//! F11, F13: many writers, readers and compactions on one folder at a time.

mod journals;
mod killed;
mod sim;

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use journals::{FINGERPRINT, append, block, create, open};
use killed::{Task, Writer, be_a_child, folder};
use logratio::{
    cache::{Cache, ReadMode},
    content_key::Key,
};
use sim::chance::{Chance, times};

/// Not a test by itself: the child of the next one.
#[test]
fn writes_until_it_is_killed() {
    be_a_child();
}

/// Each has a separate journal, and compaction leaves alone what is written.
#[test]
fn a_hundred_writers_never_share_a_journal() {
    let folder = folder();
    let start = |seed| {
        Writer::start(
            "writes_until_it_is_killed",
            folder.path(),
            seed,
            Task::Append,
        )
    };
    let mut children: Vec<Writer> = (0..100).map(start).collect();
    let mut paths = BTreeSet::new();
    let mut acknowledged: Vec<u64> = Vec::new();
    for child in &mut children {
        paths.insert(child.hear("writer "));
        acknowledged.push(child.hear("acknowledged ").parse().expect("a number"));
        if paths.len() == 50 {
            let compacted = Cache::new(folder.path(), FINGERPRINT)
                .compact(true)
                .expect("compacts");
            assert!(paths.iter().all(|path| Path::new(path).exists()));
            let in_use: BTreeSet<String> = compacted.in_use.into_iter().collect();
            let name = |path: &String| {
                Path::new(path)
                    .file_name()
                    .expect("a name")
                    .to_string_lossy()
                    .into_owned()
            };
            assert!(paths.iter().map(name).all(|name| in_use.contains(&name)));
        }
    }
    assert_eq!(paths.len(), 100, "two writers on one journal");
    for child in children {
        acknowledged.extend(child.kill());
    }
    let cache = Cache::new(folder.path(), FINGERPRINT);
    let compacted = cache.compact(false).expect("compacts");
    assert!(compacted.in_use.is_empty());
    assert!(paths.iter().all(|path| !Path::new(path).exists()));
    let reader = open(folder.path()).expect("opens");
    let keys: Vec<Key> = acknowledged
        .into_iter()
        .flat_map(block)
        .map(|(key, _)| key)
        .collect();
    assert!(
        reader
            .join(&keys)
            .expect("joins")
            .iter()
            .all(|row| *row >= 0)
    );
}

/// Eight readers open the folder again and again while four writers append, seal and begin anew
/// and two threads compact and one looks for damage: each finds everything that was acknowledged before it looked, with its
/// values. The writers start and end all the time, which is when compaction could mistake a young
/// journal for a dead one.
#[test]
fn readers_beside_sealing_and_compaction_find_everything() {
    let folder = folder();
    let path = folder.path();
    create(path); // makes the folder a cache
    let acknowledged = Mutex::new(Vec::new());
    let done = AtomicBool::new(false);
    let (compacted, opened) = (AtomicU64::new(0), AtomicU64::new(0));
    let writers = 120 * times("LOGRATIO_WRITERS", 1) as u64;
    thread::scope(|scope| {
        let compactions = [0, 1].map(|_| scope.spawn(|| compact_until(path, &done, &compacted)));
        scope.spawn(|| report_until(path, &done));
        let readers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| read_until(path, &acknowledged, &done, &opened)))
            .collect();
        let write = |thread: u64| {
            let (acknowledged, compacted, opened) = (&acknowledged, &compacted, &opened);
            let rounds = (0..writers).inspect(move |round| {
                wait_for(compacted, 4 * round / writers);
                wait_for(opened, 12 * round / writers);
            });
            scope.spawn(move || write_and_seal(path, thread * 1_000_000, rounds, acknowledged))
        };
        let ended = [0, 1, 2, 3].map(write).map(thread::ScopedJoinHandle::join);
        done.store(true, Ordering::Release);
        for end in ended {
            end.expect("writes");
        }
        for reader in readers {
            reader.join().expect("reads");
        }
        for thread in compactions {
            thread.join().expect("compacts");
        }
        let [opened, compacted] = [&opened, &compacted].map(|times| times.load(Ordering::Acquire));
        assert!(
            opened > 8 && compacted > 2,
            "{opened} opened, {compacted} compacted"
        );
    });
    check(
        path,
        &acknowledged.into_inner().expect("no panic"),
        ReadMode::Map,
    );
    let cache = Cache::new(path, FINGERPRINT);
    cache.compact(false).expect("compacts");
    let report = cache.verify().expect("verifies");
    assert!(
        report.is_whole() && report.leftovers.is_empty(),
        "{report:?}"
    );
}

fn write_and_seal(
    path: &Path,
    first: u64,
    rounds: impl Iterator<Item = u64>,
    acknowledged: &Mutex<Vec<u64>>,
) {
    let mut chance = Chance(first);
    let mut numbers = first..;
    for _ in rounds {
        let mut writer = create(path);
        for number in numbers.by_ref().take(1 + chance.below(3)) {
            append(&mut writer, &block(number)).expect("appends");
            acknowledged.lock().expect("no panic").push(number);
        }
        if chance.flip() {
            writer.seal().expect("seals");
        }
    }
}

/// Lets others keep up: where compaction gets no turn, files become too many to be open at once.
fn wait_for(counted: &AtomicU64, times: u64) {
    let start = Instant::now();
    while counted.load(Ordering::Acquire) < times {
        assert!(start.elapsed().as_secs() < 60, "no turn in a minute");
        thread::sleep(Duration::from_millis(1));
    }
}

fn compact_until(path: &Path, done: &AtomicBool, times: &AtomicU64) {
    while !done.load(Ordering::Acquire) {
        Cache::new(path, FINGERPRINT)
            .compact(false)
            .expect("compacts");
        times.fetch_add(1, Ordering::AcqRel);
    }
}

/// A file that goes because its records are somewhere else now is no damage.
fn report_until(path: &Path, done: &AtomicBool) {
    let cache = Cache::new(path, FINGERPRINT);
    while !done.load(Ordering::Acquire) {
        for report in [cache.inspect(), cache.verify()] {
            let report = report.expect("looks");
            assert!(report.is_whole(), "{report:?}");
        }
    }
}

fn read_until(path: &Path, acknowledged: &Mutex<Vec<u64>>, done: &AtomicBool, opened: &AtomicU64) {
    let mut times = 0;
    while !done.load(Ordering::Acquire) {
        let known = acknowledged.lock().expect("no panic").clone();
        let mode = if times % 2 == 0 {
            ReadMode::Map
        } else {
            ReadMode::Pread
        };
        check(path, &known, mode);
        times += 1;
        opened.fetch_add(1, Ordering::AcqRel);
    }
}

/// Whatever was acknowledged is there, with its values.
fn check(path: &Path, known: &[u64], mode: ReadMode) {
    let reader = Cache::new(path, FINGERPRINT)
        .open(mode)
        .expect("a consistent snapshot");
    let records: Vec<_> = known.iter().copied().flat_map(block).collect();
    let keys: Vec<Key> = records.iter().map(|(key, _)| *key).collect();
    let rows = reader.join(&keys).expect("joins");
    assert!(
        rows.iter().all(|row| *row >= 0),
        "an acknowledged block is not there"
    );
    let values: Vec<f32> = records.into_iter().flat_map(|(_, values)| values).collect();
    assert_eq!(reader.read(&rows).expect("reads").1, values);
}
