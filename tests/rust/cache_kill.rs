//! F02, F12: `kill -9` at any moment, while a writer appends, seals and compacts.
//!
//! Run longer with `LOGRATIO_KILLS=5`, which is how many times as many; `make torture` does.

mod journals;
mod killed;
mod sim;

use std::{collections::BTreeSet, ops::Range, path::Path, thread, time::Duration};

use journals::{FINGERPRINT, block, open};
use killed::{BLOCKS, Task, Writer, be_a_child, folder};
use logratio::{
    cache::{Cache, CacheReader},
    content_key::Key,
};
use sim::chance::{Chance, for_seeds, times};

/// Not a test by itself: the child of the others.
#[test]
fn writes_until_it_is_killed() {
    be_a_child();
}

fn start(folder: &Path, seed: u64, task: Task) -> Writer {
    Writer::start("writes_until_it_is_killed", folder, seed, task)
}

/// Every acknowledged block is there with its values, and nothing that nobody wrote. `started` are
/// the children's seeds.
fn check(reader: &CacheReader, started: Range<u64>, acknowledged: &[u64]) {
    let known: BTreeSet<u64> = acknowledged.iter().copied().collect();
    // A block that was written and not acknowledged is the first of its writer's, or the next.
    let first = started.map(|seed| seed * BLOCKS);
    let next = known.iter().map(|number| number + 1).chain(first);
    let tried: BTreeSet<u64> = known.iter().copied().chain(next).collect();
    let records: Vec<_> = tried.iter().copied().flat_map(block).collect();
    let keys: Vec<Key> = records.iter().map(|(key, _)| *key).collect();
    let rows = reader.join(&keys).expect("joins");
    for (number, pair) in tried.iter().zip(rows.chunks(2)) {
        let there = pair.iter().filter(|row| **row >= 0).count();
        assert!(
            there == 2 || !known.contains(number),
            "block {number} is lost"
        );
        assert!(there != 1, "half of block {number}");
    }
    let (rows, values): (Vec<i64>, Vec<Vec<f32>>) = rows
        .into_iter()
        .zip(records.into_iter().map(|(_, values)| values))
        .filter(|(row, _)| *row >= 0)
        .unzip();
    assert_eq!(reader.read(&rows).expect("reads").1, values.concat());
    let distinct = reader.distinct().expect("agrees") as usize;
    assert_eq!(distinct, rows.len(), "a key that nobody wrote");
}

/// As many kills in one folder; the blocks that were acknowledged.
fn kills(seed: u64, kills: u64) -> u64 {
    let folder = folder();
    let mut chance = Chance(seed);
    let mut acknowledged = vec![];
    for kill in 0..kills {
        let task = [Task::Append, Task::Seal, Task::Compact][chance.below(3)];
        let number = seed * kills + kill;
        let mut child = start(folder.path(), number, task);
        child.hear("writer ");
        thread::sleep(Duration::from_micros(chance.below(15_000) as u64));
        acknowledged.extend(child.kill());
    }
    let started = seed * kills..(seed + 1) * kills;
    let check = |reader: &CacheReader| check(reader, started.clone(), &acknowledged);
    check(&open(folder.path()).expect("at most torn tails"));
    let cache = Cache::new(folder.path(), FINGERPRINT);
    let compacted = cache.compact(false).expect("compacts");
    assert!(
        compacted.in_use.is_empty(),
        "a dead writer holds {:?}",
        compacted.in_use
    );
    check(&open(folder.path()).expect("opens"));
    let report = cache.verify().expect("verifies");
    assert!(
        report.is_whole() && report.leftovers.is_empty(),
        "{report:?}"
    );
    acknowledged.len() as u64
}

#[test]
fn kill_minus_nine_loses_nothing_that_was_acknowledged() {
    let rounds = 80 * times("LOGRATIO_KILLS", 1);
    let acknowledged = for_seeds(1..1 + rounds, |seed| kills(seed, 25));
    assert!(
        acknowledged > 10 * rounds as u64,
        "the children came to write"
    );
}

/// 32 writers at once on two folders, killed one after the other; then one is merged into the
/// other and compacted: the union, exactly.
#[test]
fn thirty_two_killed_writers_leave_their_union() {
    for round in 0..times("LOGRATIO_KILLS", 1) as u64 {
        let folders = [folder(), folder()];
        let mut chance = Chance(round);
        let path = |number: u64| folders[number as usize % 2].path();
        let start = |number: u64| start(path(number), round * 32 + number, Task::Seal);
        let mut children: Vec<Writer> = (0..32).map(start).collect();
        let mut acknowledged: Vec<u64> = Vec::new();
        for child in &mut children {
            acknowledged.push(child.hear("acknowledged ").parse().expect("a number"));
        }
        while !children.is_empty() {
            let child = children.swap_remove(chance.below(children.len()));
            acknowledged.extend(child.kill());
        }
        let [here, there] = [0, 1].map(|folder| Cache::new(folders[folder].path(), FINGERPRINT));
        here.merge(&[there]).expect("merges");
        let started = round * 32..(round + 1) * 32;
        check(
            &open(here.folder()).expect("opens"),
            started.clone(),
            &acknowledged,
        );
        here.compact(false).expect("compacts");
        let reader = open(here.folder()).expect("opens");
        check(&reader, started, &acknowledged);
        assert_eq!(reader.len() as u64, reader.distinct().expect("agrees"));
        assert!(here.verify().expect("verifies").is_whole());
    }
}
