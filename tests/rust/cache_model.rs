//! F21: whatever is done, in whatever order, two caches hold what two maps hold.
//!
//! Run longer with `PROPTEST_CASES=1000000`.

mod sim;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use logratio::{
    cache::{Cache, CacheWriter, ReadMode, ValueKind},
    content_key::Key,
};
use proptest::{collection::vec, option, prelude::*};
use sim::{
    SimDisk,
    life::FOLDERS,
    records::{append, assert_values, key, logps, sum},
};

/// So few records that they meet again.
const RECORDS: usize = 24;

#[derive(Clone, Debug)]
enum Step {
    Start,
    Append(usize, Vec<usize>),
    Seal(usize),
    Close(usize),
    Compact,
    Merge,
    Join(Vec<usize>),
    Slice(Option<usize>, usize),
}

fn some_step() -> impl Strategy<Value = Step> {
    let numbers = || vec(0..RECORDS, 0..6);
    prop_oneof![
        2 => Just(Step::Start),
        6 => (0..4_usize, numbers()).prop_map(|(writer, numbers)| Step::Append(writer, numbers)),
        2 => (0..4_usize).prop_map(Step::Seal),
        1 => (0..4_usize).prop_map(Step::Close),
        1 => Just(Step::Compact),
        1 => Just(Step::Merge),
        3 => numbers().prop_map(Step::Join),
        2 => (option::of(0..RECORDS), 0..RECORDS).prop_map(|(after, limit)| Step::Slice(after, limit)),
    ]
}

/// The cache that is looked at, another one that is merged into it, and what they must hold.
struct Run {
    caches: [Cache; 2],
    kind: ValueKind,
    writers: Vec<(usize, CacheWriter)>,
    models: [BTreeSet<usize>; 2],
    started: usize,
}

impl Run {
    fn new(kind: ValueKind) -> Self {
        let disk = Arc::new(SimDisk::default());
        let cache = |folder: &str| {
            let cache = Cache::new(folder, [7; 32]).with_kind(kind);
            cache.on(disk.clone())
        };
        let mut run = Self {
            caches: FOLDERS.map(cache),
            kind,
            writers: Vec::new(),
            models: [BTreeSet::new(), BTreeSet::new()],
            started: 0,
        };
        run.start();
        run.start();
        run
    }

    fn start(&mut self) {
        let cache = self.started % 2;
        let writer = self.caches[cache].writer().expect("a writer");
        self.writers.push((cache, writer));
        self.started += 1;
    }

    fn take(&mut self, writer: usize) -> Option<CacheWriter> {
        let count = self.writers.len();
        (count > 0).then(|| self.writers.swap_remove(writer % count).1)
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Start => self.start(),
            Step::Append(writer, numbers) if !self.writers.is_empty() => {
                let at = writer % self.writers.len();
                let (cache, writer) = &mut self.writers[at];
                append(writer, self.kind, numbers).expect("appends");
                self.models[*cache].extend(numbers);
            }
            Step::Append(..) => {}
            Step::Seal(writer) => {
                let sealed = self.take(*writer).map(CacheWriter::seal);
                sealed.map_or(Ok(None), |sealed| sealed).expect("seals");
            }
            Step::Close(writer) => drop(self.take(*writer)),
            Step::Compact => drop(self.caches[0].compact(false).expect("compacts")),
            Step::Merge => self.merge(),
            Step::Join(numbers) => self.join(numbers),
            Step::Slice(after, limit) => self.slice(after.as_ref(), *limit),
        }
    }

    fn merge(&mut self) {
        let [here, there] = &mut self.models;
        let merged = self.caches[0].merge(&self.caches[1..]).expect("merges");
        let new: BTreeSet<usize> = there.difference(here).copied().collect();
        // Those of journals here are copied too: they may not be durable yet.
        assert!((new.len()..=there.len()).contains(&(merged.completions as usize)));
        here.extend(new);
    }

    fn join(&self, numbers: &[usize]) {
        let reader = self.caches[0].open(ReadMode::Pread).expect("opens");
        let keys: Vec<Key> = numbers.iter().copied().map(key).collect();
        let rows = reader.join(&keys).expect("joins");
        let (mut found, mut places) = (Vec::new(), Vec::new());
        for (&number, row) in numbers.iter().zip(rows) {
            assert_eq!(
                row >= 0,
                self.models[0].contains(&number),
                "record {number}"
            );
            if row >= 0 {
                found.push(number);
                places.push(row);
            }
        }
        assert_values(&reader, &found, &places);
        assert_eq!(
            reader.distinct().expect("agrees"),
            self.models[0].len() as u64
        );
    }

    fn slice(&self, after: Option<&usize>, limit: usize) {
        let reader = self.caches[0].open(ReadMode::Map).expect("opens");
        let after = after.copied().map(key);
        let found = reader.slice(after.as_ref(), limit).expect("slices");
        let sorted: BTreeMap<Key, usize> = self.models[0].iter().map(|&n| (key(n), n)).collect();
        let wanted: Vec<(&Key, &usize)> = sorted
            .iter()
            .filter(|&(key, _)| after.is_none_or(|after| *key > after))
            .take(limit)
            .collect();
        assert!(found.keys.iter().eq(wanted.iter().map(|(key, _)| *key)));
        let numbers = || wanted.iter().map(|(_, number)| **number);
        assert!(
            numbers()
                .map(|number| logps(number).len() as u32)
                .eq(found.tokens)
        );
        match self.kind {
            ValueKind::PerToken => assert!(numbers().flat_map(logps).eq(found.logps)),
            ValueKind::Sums => assert!(numbers().map(sum).eq(found.sums)),
        }
    }
}

fn cases() -> ProptestConfig {
    let set = std::env::var_os("PROPTEST_CASES").is_some();
    let config = ProptestConfig::default();
    let cases = if set { config.cases } else { 10_000 };
    ProptestConfig { cases, ..config }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_cache_is_a_map(steps in vec(some_step(), 1..30), sums in any::<bool>()) {
        let mut run = Run::new(if sums { ValueKind::Sums } else { ValueKind::PerToken });
        for step in &steps {
            run.step(step);
        }
        run.join(&(0..RECORDS).collect::<Vec<_>>());
        run.slice(None, RECORDS);
    }
}
