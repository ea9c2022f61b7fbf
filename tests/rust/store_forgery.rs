//! Files that no writer made, with checksums that are right: an error, never a panic, and nothing
//! outside a column is read.

mod sample;
mod sealed;

use std::{ops::Range, sync::LazyLock};

use logratio::{Error, store::Store};
use proptest::{collection::vec, prelude::*};
use sample::fixed;
use sealed::{FOOTER, HEADER, is_corrupt, reopen, sealed_bytes, sign_all, touch};

/// Mutated stores that are opened: less where code is checked, not fast.
const MUTATIONS: u32 = if cfg!(debug_assertions) {
    2_000
} else {
    20_000
};

/// Stores of 0 to 4 groups, made once.
static SEALED: LazyLock<Vec<Vec<u8>>> =
    LazyLock::new(|| (0..5).map(|groups| sealed_bytes(&fixed(groups))).collect());

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
    assert!(changed(&|bytes| bytes[0] = b'X').contains("LRSTORE3"));
    assert!(changed(&|bytes| bytes[8] = 4).contains("version 4"));
    assert!(changed(&|bytes| bytes[12..16].reverse()).contains("big-endian"));
    assert!(changed(&|bytes| bytes[56] ^= 1).contains("bytes"));
    assert!(changed(&|bytes| bytes[16] += 9).contains("do not fit"));
    assert!(changed(&|bytes| bytes[23] = 0xff).contains("do not fit"));
    assert!(changed(&|bytes| bytes[footer + 32] += 1).contains("checksums of 1 blocks"));
    assert!(changed(&|bytes| bytes[64] ^= 1).contains("different stores"));
}

#[test]
fn a_store_of_another_version_is_refused_with_both_versions_and_the_remedy() {
    let folder = tempfile::tempdir().expect("folder");
    for version in [b'1', b'2', b'5'] {
        let mut bytes = sealed_bytes(&fixed(2));
        bytes[7] = version;
        let error = reopen(folder.path(), &bytes).expect_err("another version");
        assert!(matches!(error, Error::StoreVersion { .. }));
        let text = error.to_string();
        let found = format!("format version {}, ", char::from(version));
        for part in [
            &found,
            "reads versions 3 and 4",
            "`logratio data build`",
            ".store: ",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}

/// Where the columns of a store with these counts begin, as FORMAT.md has it.
fn columns(bytes: &[u8]) -> [Range<usize>; 9] {
    let count = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8")) as usize;
    let (groups, completions, tokens, own) = (count(16), count(24), count(32), count(40));
    let sizes = [
        4 * tokens,
        own,
        8 * (groups + 1),
        8 * (completions + 1),
        8 * (groups + 1),
        completions,
        16 * completions,
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
    let mut infinite = bytes.clone();
    infinite[columns[6].start..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    sign_all(&mut infinite);
    let store = reopen(folder.path(), &infinite).expect("opens");
    let error = store.verify().expect_err("forged").to_string();
    assert!(
        error.contains("the score of completion 0 is infinite"),
        "{error}"
    );
    assert!(is_corrupt(&store.values()));
    let end = columns[8].end.next_multiple_of(64);
    let (error, store) = verified(end, 0xff);
    assert!(
        error.contains("UTF-8") && is_corrupt(&store.metadata()),
        "{error}"
    );
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
        let mut bytes = SEALED[lengths.0].clone();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(bytes.len() - if signed { 0 } else { lengths.1 });
        if signed {
            sign_all(&mut bytes);
        }
        if let Ok(store) = Store::from_bytes(&bytes) {
            prop_assert!(touch(&store).iter().all(|one| one.is_ok() || is_corrupt(one)));
            let verified = store.verify();
            prop_assert!(verified.is_ok() || is_corrupt(&verified));
        }
    }

    #[test]
    fn survives_any_bytes(mut bytes in vec(any::<u8>(), 0..600), counts in any::<[u8; 6]>(), kind in 0..4u8) {
        if kind > 0 && bytes.len() >= HEADER + FOOTER {
            let length = bytes.len() as u64;
            bytes[..16].copy_from_slice(b"LRSTORE3\x03\0\0\0\x04\x03\x02\x01");
            for (field, count) in counts.into_iter().enumerate() {
                let small = u64::from(count) >> (kind + 1);
                bytes[16 + 8 * field..][..8].copy_from_slice(&small.to_le_bytes());
            }
            bytes[56..64].copy_from_slice(&length.to_le_bytes());
            sign_all(&mut bytes);
        }
        if let Ok(store) = Store::from_bytes(&bytes) {
            prop_assert!(touch(&store).iter().all(|one| one.is_ok() || is_corrupt(one)));
        }
    }
}
