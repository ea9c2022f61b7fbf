//! F02, F12: `kill -9` at any moment, while a writer appends, seals and compacts.
//!
//! Run longer with `LOGRATIO_KILLS=5`, which is how many times as many; `make torture` does.

mod journals;
mod killed;
mod sim;

use std::{collections::BTreeSet, path::Path, thread, time::Duration};

use journals::{FINGERPRINT, block, open};
use killed::{BLOCKS, Task, Writer, be_a_child, folder};
use logratio::{
    cache::{Cache, CacheReader},
    fingerprint::Key,
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

/// Every acknowledged block is there with its values, and nothing that nobody wrote.
fn check(reader: &CacheReader, acknowledged: &[u64]) {
    let known: BTreeSet<u64> = acknowledged.iter().copied().collect();
    // A block that was written and not acknowledged is the next of its writer's.
    let next = known.iter().map(|number| number + 1);
    let tried: BTreeSet<u64> = known.iter().copied().chain(next).collect();
    let mut found = 0;
    for number in tried {
        let records = block(number);
        let keys: Vec<Key> = records.iter().map(|(key, _)| *key).collect();
        let rows = reader.join(&keys).expect("joins");
        if rows.contains(&-1) {
            assert!(!known.contains(&number), "block {number} is lost");
            assert_eq!(rows, [-1, -1], "half of block {number}");
            continue;
        }
        let values: Vec<f32> = records.into_iter().flat_map(|(_, values)| values).collect();
        assert_eq!(
            reader.read(&rows).expect("reads").1,
            values,
            "block {number}"
        );
        found += rows.len() as u64;
    }
    assert_eq!(
        reader.distinct().expect("agrees"),
        found,
        "a key that nobody wrote"
    );
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
        acknowledged.push(number * BLOCKS - 1); // the block before its first: never written
        thread::sleep(Duration::from_micros(chance.below(15_000) as u64));
        acknowledged.extend(child.kill());
    }
    let never = |number: &u64| (number + 1) % BLOCKS == 0;
    let firsts: Vec<u64> = acknowledged.iter().copied().filter(never).collect();
    acknowledged.retain(|number| !never(number));
    let check = |reader: &CacheReader| check_with(reader, &acknowledged, &firsts);
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

/// The first block of a child may be there, though none of its blocks was acknowledged.
fn check_with(reader: &CacheReader, acknowledged: &[u64], before: &[u64]) {
    let known: BTreeSet<u64> = acknowledged.iter().copied().collect();
    let first = before.iter().map(|number| number + 1);
    let there = first.filter(|number| {
        let keys: Vec<Key> = block(*number).iter().map(|(key, _)| *key).collect();
        let rows = reader.join(&keys).expect("joins");
        !known.contains(number) && rows.iter().all(|row| *row >= 0)
    });
    let all: Vec<u64> = known.iter().copied().chain(there).collect();
    check(reader, &all);
}

#[test]
fn kill_minus_nine_loses_nothing_that_was_acknowledged() {
    let rounds = 40 * times("LOGRATIO_KILLS", 1);
    let acknowledged = for_seeds(1..1 + rounds, |seed| kills(seed, 50));
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
        check(&open(here.folder()).expect("opens"), &acknowledged);
        here.compact(false).expect("compacts");
        let reader = open(here.folder()).expect("opens");
        check(&reader, &acknowledged);
        assert_eq!(reader.len() as u64, reader.distinct().expect("agrees"));
        assert!(here.verify().expect("verifies").is_whole());
    }
}
