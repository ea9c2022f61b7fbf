//! A damaged or forged store is an error at open or where it is read: never a wrong value, never a
//! panic.

mod sample;

use std::{fs, ops::Range, os::unix::fs::FileExt, path::Path, sync::LazyLock, thread};

use logratio::{
    Error,
    layout::{Batch, Options},
    plan::{self, Layout, Order, Request},
    store::{Store, StoreWriter},
};
use proptest::{collection::vec, prelude::*};
use sample::{Completion, Sample, assert_holds, fill, fixed};

const HEADER: usize = 128;
const FOOTER: usize = 64;
const BLOCK: usize = 64 << 10;
/// Mutated files that are opened: less where code is checked, not fast.
const MUTATIONS: u32 = if cfg!(debug_assertions) {
    2_000
} else {
    20_000
};

/// Stores of 0 to 4 groups, made once.
static SEALED: LazyLock<Vec<Vec<u8>>> =
    LazyLock::new(|| (0..5).map(|groups| sealed_bytes(&fixed(groups))).collect());

fn sign(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
}

/// Makes every checksum right, as no accident can, where the header still says where they are.
fn sign_all(bytes: &mut [u8]) {
    let footer = bytes.len() - FOOTER;
    let blocks = u64::from_le_bytes(bytes[footer + 32..footer + 40].try_into().expect("8"));
    let table = usize::try_from(blocks)
        .ok()
        .and_then(|blocks| blocks.checked_mul(4)?.checked_next_multiple_of(64))
        .and_then(|length| footer.checked_sub(length))
        .filter(|&table| table >= HEADER);
    if let Some(table) = table {
        for (block, start) in (0..table).step_by(BLOCK).enumerate() {
            let crc = crc32c::crc32c(&bytes[start.max(HEADER)..table.min(start + BLOCK)]);
            bytes[table + 4 * block..][..4].copy_from_slice(&crc.to_le_bytes());
        }
        let crc = crc32c::crc32c(&bytes[table..footer]);
        bytes[footer + 40..footer + 44].copy_from_slice(&crc.to_le_bytes());
    }
    sign(&mut bytes[footer..]);
    sign(&mut bytes[..HEADER]);
}

fn sealed_bytes(samples: &[Sample]) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("groups.store");
    fill(StoreWriter::create(&path).expect("creates"), samples);
    fs::read(path).expect("reads")
}

/// Opens a copy, whose file is written anew: cutting a file short in place is slow on ext4.
fn reopen(folder: &Path, bytes: &[u8]) -> logratio::Result<Store> {
    let path = folder.join("copy.store");
    let _ = fs::remove_file(&path);
    fs::write(&path, bytes).expect("writes");
    Store::open(&path)
}

/// Reads everything that a store can be asked for, each method whatever became of the others.
fn touch(store: &Store) -> Vec<logratio::Result<()>> {
    let all: Vec<i64> = (0..store.len() as i64).collect();
    let request = Request::new(Order::LengthGrouped, 2, 64);
    let lay_out = |layout| {
        let batch = Batch::new(store, &all, Options::new(layout))?;
        let mut arena = vec![0i64; batch.table().bytes() / 8];
        batch.fill(bytemuck::cast_slice_mut(&mut arena))
    };
    let plan = || plan::plan(&store.shapes()?, &request);
    vec![
        plan().map(drop),
        lay_out(Layout::Shared),
        lay_out(Layout::Padded),
        store.keys().map(drop),
        store.counted_lengths().map(drop),
        store.completion_lengths().map(drop),
        store.prompt_lengths().map(drop),
        store.completion_offsets().map(drop),
        store.roles().map(drop),
        store.files().map(drop),
        store.lines().map(drop),
        store.metadata().map(drop),
        store.groups().try_for_each(|group| group.map(drop)),
        store.select(&vec![true; all.len()], None, "").map(drop),
    ]
}

fn is_corrupt<T>(result: &logratio::Result<T>) -> bool {
    match result {
        Ok(_) => false,
        Err(Error::CorruptStore { .. }) => true,
        Err(error) => panic!("not a corrupt store, but: {error}"),
    }
}

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
fn a_foreign_file_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = sealed_bytes(&fixed(2));
    let changed = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        sign_all(&mut bytes);
        let error = reopen(folder.path(), &bytes).expect_err("foreign");
        error.to_string()
    };
    let footer = bytes.len() - FOOTER;
    assert!(changed(&|bytes| bytes[0] = b'X').contains("LRSTORE2"));
    assert!(changed(&|bytes| bytes[7] = b'1').contains("build the store again"));
    assert!(changed(&|bytes| bytes[8] = 3).contains("version 3"));
    assert!(changed(&|bytes| bytes[12..16].reverse()).contains("big-endian"));
    assert!(changed(&|bytes| bytes[56] ^= 1).contains("bytes"));
    assert!(changed(&|bytes| bytes[16] += 9).contains("do not fit"));
    assert!(changed(&|bytes| bytes[23] = 0xff).contains("do not fit"));
    assert!(changed(&|bytes| bytes[footer + 32] += 1).contains("checksums of 1 blocks"));
    assert!(changed(&|bytes| bytes[64] ^= 1).contains("different stores"));
}

/// Where the columns of a store with these counts begin, as FORMAT.md has it.
fn columns(bytes: &[u8]) -> [Range<usize>; 8] {
    let count = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8")) as usize;
    let (groups, completions, tokens, own) = (count(16), count(24), count(32), count(40));
    let sizes = [
        4 * tokens,
        own,
        8 * (groups + 1),
        8 * (completions + 1),
        8 * (groups + 1),
        completions,
        4 * groups,
        8 * groups,
    ];
    let mut end = HEADER;
    sizes.map(|size| {
        let start = end.next_multiple_of(64);
        end = start + size;
        start..end
    })
}

/// Offsets that no writer makes, in a file whose checksums are all right.
#[test]
fn forged_offsets_lead_nowhere() {
    let bytes = sealed_bytes(&fixed(6));
    let folder = tempfile::tempdir().expect("folder");
    let columns = columns(&bytes);
    for column in &columns[2..5] {
        for at in column.clone().step_by(8) {
            let right = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8"));
            let wrong = [
                0,
                1,
                right + 1,
                right.wrapping_sub(1),
                1 << 31,
                1 << 32,
                1 << 40,
                1 << 63,
            ];
            for value in wrong.into_iter().chain([u64::MAX - 1, u64::MAX]) {
                let mut bytes = bytes.clone();
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
                sign_all(&mut bytes);
                let store = reopen(folder.path(), &bytes).expect("open reads no column");
                let read = touch(&store);
                assert!(value == right || read.iter().all(|one| one.is_ok() || is_corrupt(one)));
                let verified = store.verify();
                assert!(value == right || is_corrupt(&verified), "{value} at {at}");
            }
        }
    }
}

#[test]
fn forged_values_are_found() {
    let bytes = sealed_bytes(&fixed(6));
    let columns = columns(&bytes);
    let folder = tempfile::tempdir().expect("folder");
    let verified = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        sign_all(&mut bytes);
        let store = reopen(folder.path(), &bytes).expect("opens");
        (store.verify().expect_err("forged").to_string(), store)
    };
    assert!(
        verified(columns[0].start + 7, 0x80)
            .0
            .contains("value 1 of tokens")
    );
    assert!(
        verified(columns[1].start + 2, 2)
            .0
            .contains("value 2 of mask")
    );
    let (error, store) = verified(columns[5].start, 5);
    assert!(error.contains("role 5 is unknown"), "{error}");
    assert!(is_corrupt(&store.roles()) && is_corrupt(&store.group(0)));
    assert!(verified(columns[0].start, 77).0.contains("the digest"));
    let end = columns[7].end.next_multiple_of(64);
    let (error, store) = verified(end, 0xff);
    assert!(
        error.contains("UTF-8") && is_corrupt(&store.metadata()),
        "{error}"
    );
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(MUTATIONS))]

    /// Bytes changed anywhere, with all checksums made right afterwards.
    #[test]
    fn survives_a_forged_file(
        changes in vec((0usize..10_000, any::<u8>()), 1..6),
        lengths in (0usize..5, 0usize..200),
        signed in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().expect("folder");
        let mut bytes = SEALED[lengths.0].clone();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(bytes.len() - if signed { 0 } else { lengths.1 });
        if signed {
            sign_all(&mut bytes);
        }
        if let Ok(store) = reopen(folder.path(), &bytes) {
            prop_assert!(touch(&store).iter().all(|one| one.is_ok() || is_corrupt(one)));
            let verified = store.verify();
            prop_assert!(verified.is_ok() || is_corrupt(&verified));
        }
    }

    #[test]
    fn survives_any_bytes(mut bytes in vec(any::<u8>(), 0..600), counts in any::<[u8; 6]>(), kind in 0..4u8) {
        let folder = tempfile::tempdir().expect("folder");
        if kind > 0 && bytes.len() >= HEADER + FOOTER {
            let length = bytes.len() as u64;
            bytes[..16].copy_from_slice(b"LRSTORE2\x02\0\0\0\x04\x03\x02\x01");
            for (field, count) in counts.into_iter().enumerate() {
                let small = u64::from(count) >> (kind + 1);
                bytes[16 + 8 * field..][..8].copy_from_slice(&small.to_le_bytes());
            }
            bytes[56..64].copy_from_slice(&length.to_le_bytes());
            sign_all(&mut bytes);
        }
        if let Ok(store) = reopen(folder.path(), &bytes) {
            prop_assert!(touch(&store).iter().all(|one| one.is_ok() || is_corrupt(one)));
        }
    }
}
