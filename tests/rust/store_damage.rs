//! A damaged store is an error at open or where it is read: never a wrong value, never a panic.

mod sample;
mod sealed;

use std::{fs, os::unix::fs::FileExt, thread};

use logratio::store::Store;
use sample::{Completion, Sample, assert_holds, fixed};
use sealed::{BLOCK, FOOTER, HEADER, is_corrupt, reopen, sealed_bytes, touch};

#[test]
fn every_flipped_bit_is_found_before_a_value_is_read() {
    let samples = fixed(3);
    let bytes = sealed_bytes(&samples);
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("copy.store");
    fs::write(&path, &bytes).expect("writes");
    let file = fs::File::options().write(true).open(&path).expect("opens");
    for bit in 0..bytes.len() * 8 {
        let (byte, at) = (bytes[bit / 8], bit as u64 / 8);
        file.write_all_at(&[byte ^ 1 << (bit % 8)], at)
            .expect("flips");
        match Store::open(&path) {
            // One block holds all of this store, so whatever is read finds the flip.
            Ok(store) => {
                let read = touch(&store);
                assert!(read.iter().all(is_corrupt), "bit {bit}: {read:?}");
                assert!(is_corrupt(&store.verify()), "bit {bit}");
            }
            Err(error) => assert!(is_corrupt::<()>(&Err(error))),
        }
        file.write_all_at(&[byte], at).expect("flips back");
    }
    assert_holds(&Store::open(&path).expect("whole again"), &samples);
}

#[test]
fn every_cut_and_every_addition_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let mut bytes = sealed_bytes(&fixed(4));
    for length in 0..bytes.len() {
        let cut = reopen(folder.path(), &bytes[..length]);
        assert!(is_corrupt(&cut), "cut to {length}");
    }
    bytes.push(0);
    assert!(is_corrupt(&reopen(folder.path(), &bytes)));
}

/// Groups that fill several blocks, none of them the same.
fn long(groups: usize) -> Vec<Sample> {
    let one = |group: usize| Sample {
        prompt: (0..5_000).map(|id| (id + group) as i32).collect(),
        completions: vec![Completion {
            tokens: (0..5_000).map(|id| ((id * group) as i32, 1)).collect(),
            role: 0,
            values: [0.5, f32::NAN, -1.0, 2.0],
        }],
    };
    (0..groups).map(one).collect()
}

#[test]
fn a_flip_is_found_at_the_first_read_of_its_block_and_at_no_other() {
    let folder = tempfile::tempdir().expect("folder");
    let samples = long(20);
    let mut bytes = sealed_bytes(&samples);
    bytes[HEADER + 4 * 10_000 * 10 + 8] ^= 1; // an id of group 10's prompt
    let store = reopen(folder.path(), &bytes).expect("open reads no column");
    let found: Vec<_> = store.groups().map(|group| group.is_err()).collect();
    let block = (HEADER + 4 * 10_000 * 10 + 8) / BLOCK;
    let touched = |group: usize| {
        let range = HEADER + 40_000 * group..HEADER + 40_000 * (group + 1);
        range.start / BLOCK <= block && block <= (range.end - 1) / BLOCK
    };
    assert_eq!(found, (0..20).map(touched).collect::<Vec<_>>());
    assert!(found.contains(&false) && found[10]);
    assert_eq!(store.lines().expect("another block").len(), 20);
    let error = store.group(10).expect_err("again").to_string();
    let range = format!(
        "block {block}, bytes {}..{} (tokens)",
        block * BLOCK,
        (block + 1) * BLOCK
    );
    assert!(error.contains(&range), "{error}");
    bytes[HEADER + 4] ^= 1;
    let error = reopen(folder.path(), &bytes)
        .expect("opens")
        .verify()
        .expect_err("both");
    let error = error.to_string();
    assert!(error.contains("2 of 1"), "{error}");
    assert!(error.contains("bytes 128..65536 (tokens)"), "{error}");
}

#[test]
fn halves_of_two_stores_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let mut other = fixed(9);
    other[0].prompt[0] += 1;
    let (one, two) = (sealed_bytes(&fixed(9)), sealed_bytes(&other));
    assert_eq!(one.len(), two.len());
    for cut in [HEADER, one.len() / 2, one.len() - FOOTER] {
        let mixed = [&one[..cut], &two[cut..]].concat();
        let error = reopen(folder.path(), &mixed)
            .expect_err("mixed")
            .to_string();
        assert!(error.contains("belong to different stores"), "{error}");
    }
}

#[test]
fn threads_read_one_store_at_once() {
    let samples = long(40);
    let folder = tempfile::tempdir().expect("folder");
    let store = reopen(folder.path(), &sealed_bytes(&samples)).expect("opens");
    let wait = std::sync::Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                wait.wait();
                assert_holds(&store, &samples);
            });
        }
    });
}
