//! A writer that died goes on from its last checkpoint, as if nothing had happened.

mod sample;

use std::{fs, path::Path};

use logratio::{
    Error,
    store::{Outcome, Store, StoreWriter},
};
use proptest::{collection::vec, prelude::*};
use sample::{assert_holds, fill, fixed, push, store};

fn create(path: &Path, deduplicate: bool) -> StoreWriter {
    let writer = StoreWriter::create(path).expect("creates");
    if deduplicate {
        return writer.deduplicating().expect("empty");
    }
    writer
}

fn resume(path: &Path, deduplicate: bool) -> Option<(StoreWriter, String)> {
    StoreWriter::resume(path, deduplicate).expect("reads")
}

/// What a crash at this moment leaves at `path`: the files of a writer that is alive elsewhere.
fn crash(alive: &Path, path: &Path) {
    let folder = |path: &Path| path.with_extension("store.partial");
    let _ = fs::remove_dir_all(folder(path));
    fs::create_dir(folder(path)).expect("creates");
    for entry in fs::read_dir(folder(alive)).expect("lists") {
        let entry = entry.expect("lists");
        fs::copy(entry.path(), folder(path).join(entry.file_name())).expect("copies");
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Push the next groups, then some of the earlier ones again.
    Push(usize, usize),
    Checkpoint,
    /// Die, with some bytes lost and some torn ones behind every column.
    Crash(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1usize..8, 0usize..4).prop_map(|(new, old)| Step::Push(new, old)),
        Just(Step::Checkpoint),
        (0usize..2_000).prop_map(Step::Crash),
    ];
    vec(step, 1..14)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn what_is_resumed_is_what_was_never_interrupted(steps in steps(), deduplicate in any::<bool>()) {
        let folder = tempfile::tempdir().expect("folder");
        let paths = ["a.store", "b.store"].map(|name| folder.path().join(name));
        let mut path = &paths[0];
        let samples = fixed(200);
        let mut writer = create(path, deduplicate);
        let mut pushed: Vec<usize> = Vec::new();
        let mut saved = None;
        for step in steps {
            match step {
                Step::Push(new, old) => {
                    let next = pushed.iter().max().map_or(0, |last| last + 1);
                    for number in (next..next + new).chain(0..old.min(next)) {
                        push(&mut writer, number, &samples[number]);
                        pushed.push(number);
                    }
                }
                Step::Checkpoint => {
                    writer.checkpoint(&pushed.len().to_string()).expect("saves");
                    saved = Some(pushed.len());
                }
                Step::Crash(torn) => {
                    let other = if path == &paths[0] { &paths[1] } else { &paths[0] };
                    crash(path, other);
                    for entry in fs::read_dir(other.with_extension("store.partial")).expect("lists") {
                        let file = entry.expect("lists").path();
                        if !file.ends_with("progress") && saved.is_some() {
                            let bytes = fs::read(&file).expect("reads");
                            fs::write(&file, [&bytes[..], &vec![7; torn]].concat()).expect("tears");
                        }
                    }
                    drop(writer); // of the other path
                    writer = match (resume(other, deduplicate), saved) {
                        (Some((writer, note)), Some(saved)) => {
                            prop_assert_eq!(note, saved.to_string());
                            pushed.truncate(saved);
                            writer
                        }
                        (None, None) => {
                            pushed.clear();
                            create(other, deduplicate)
                        }
                        (found, _) => panic!("{found:?}, but {saved:?}"),
                    };
                    path = other;
                }
            }
        }
        let mut undisturbed = StoreWriter::in_memory();
        if deduplicate {
            undisturbed = undisturbed.deduplicating().expect("empty");
        }
        for &number in &pushed {
            push(&mut undisturbed, number, &samples[number]);
        }
        prop_assert_eq!(writer.len(), undisturbed.len());
        prop_assert_eq!(writer.conflicts(), undisturbed.conflicts());
        for group in 0..writer.len() as i64 {
            prop_assert_eq!(writer.place(group).expect("kept"), undisturbed.place(group).expect("kept"));
        }
        let (sealed, expected) = (writer.finish("{}").expect("seals"), undisturbed.finish("{}").expect("seals"));
        prop_assert_eq!(sealed.digest(), expected.digest());
        sealed.verify().expect("whole");
    }

    /// Any byte of any file changed, or the file cut: no checkpoint, and never a panic.
    #[test]
    fn a_damaged_checkpoint_is_none(file in 0usize..11, at in 0usize..100_000, value in 1u8.., cut in any::<bool>()) {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("a.store");
        let mut writer = create(&path, true);
        for number in [0, 1, 2, 3, 1, 2] {
            push(&mut writer, number, &fixed(4)[number]);
        }
        writer.checkpoint("note").expect("saves");
        drop(writer);
        let names = ["tokens", "mask", "prompt_offsets", "completion_offsets", "group_offsets"];
        let names: Vec<_> = names.into_iter().chain(["roles", "values", "files", "lines", "repeats", "progress"]).collect();
        let file = folder.path().join("a.store.partial").join(names[file]);
        let mut bytes = fs::read(&file).expect("reads");
        let room = if file.ends_with("tokens") { 128 } else { 0 };
        let at = room + at % (bytes.len() - room);
        bytes[at] ^= value;
        bytes.truncate(if cut { at } else { bytes.len() });
        fs::write(&file, bytes).expect("writes");
        prop_assert!(resume(&path, true).is_none());
        let writer = create(&path, true);
        prop_assert!(writer.is_empty());
    }
}

/// Numbers that no writer wrote, under a checksum that is right.
#[test]
fn a_forged_checkpoint_is_none() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.store");
    let mut writer = create(&path, true);
    for number in [0, 1, 2, 1] {
        push(&mut writer, number, &fixed(3)[number]);
    }
    writer.checkpoint("note").expect("saves");
    drop(writer);
    let progress = folder.path().join("a.store.partial/progress");
    let right = fs::read(&progress).expect("reads");
    for at in (16..64).step_by(8) {
        let old = u64::from_le_bytes(right[at..at + 8].try_into().expect("8"));
        for new in [
            0,
            1,
            old + 1,
            old - 1,
            1 << 32,
            1 << 62,
            u64::MAX - 1,
            u64::MAX,
        ] {
            let mut bytes = right.clone();
            bytes[at..at + 8].copy_from_slice(&new.to_le_bytes());
            let (body, crc) = bytes.split_at_mut(right.len() - 4);
            crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
            fs::write(&progress, bytes).expect("writes");
            assert_eq!(resume(&path, true).is_some(), old == new, "{new} at {at}");
        }
    }
}

#[test]
fn a_checkpoint_outlives_its_writer_and_its_store_does_not_need_it() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.store");
    assert!(resume(&path, false).is_none());
    assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 0);
    let mut writer = create(&path, false);
    push(&mut writer, 0, &fixed(2)[0]);
    writer.checkpoint("one").expect("saves");
    push(&mut writer, 1, &fixed(2)[1]);
    drop(writer);
    let (mut writer, note) = resume(&path, false).expect("saved");
    assert_eq!((&*note, writer.len()), ("one", 1));
    push(&mut writer, 1, &fixed(2)[1]);
    let error = StoreWriter::resume(&path, false).expect_err("taken");
    assert!(error.to_string().contains("another writer"), "{error}");
    assert_holds(&writer.finish("{}").expect("seals"), &fixed(2));
    assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 1);
    assert!(resume(&path, false).is_none());
    assert_holds(&Store::open(&path).expect("stays"), &fixed(2));
}

#[test]
fn a_fresh_writer_replaces_what_could_be_resumed() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.store");
    let mut writer = create(&path, false);
    push(&mut writer, 0, &fixed(2)[0]);
    writer.checkpoint("one").expect("saves");
    drop(writer);
    let writer = create(&path, false);
    assert!(writer.is_empty());
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 0);
}

#[test]
fn another_rule_for_duplicates_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.store");
    create(&path, true).checkpoint("").expect("saves");
    let error = StoreWriter::resume(&path, false).expect_err("another rule");
    assert!(error.to_string().contains("deduplicate = true"), "{error}");
    assert!(resume(&path, true).is_some());
}

#[test]
fn votes_are_counted_on() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.store");
    let pair = |swap: bool| {
        let mut sample = fixed(2)[1].clone();
        sample.completions[0].role = u8::from(swap);
        sample.completions[1].role = u8::from(!swap);
        sample
    };
    let mut writer = create(&path, true);
    for swap in [false, true, true] {
        push(&mut writer, 0, &pair(swap));
    }
    writer.checkpoint("").expect("saves");
    push(&mut writer, 0, &pair(true));
    drop(writer);
    let (mut writer, _) = resume(&path, true).expect("saved");
    push(&mut writer, 0, &pair(true));
    push(&mut writer, 0, &pair(false));
    assert_eq!(writer.conflicts(), (vec![[0, 1]], vec![[2, 3]]));
}

#[test]
fn a_store_in_memory_has_no_checkpoints() {
    let error = StoreWriter::in_memory()
        .checkpoint("")
        .expect_err("in memory");
    assert!(matches!(error, Error::Invalid(_)));
    assert!(error.to_string().contains("give it a path"), "{error}");
}

/// A crash while the columns were being joined: the first one has the others behind it.
#[test]
fn a_crash_while_sealing_loses_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let paths = ["a.store", "b.store"].map(|name| folder.path().join(name));
    let mut writer = create(&paths[0], false);
    for (number, sample) in fixed(5).iter().enumerate() {
        push(&mut writer, number, sample);
    }
    writer.checkpoint("all").expect("saves");
    crash(&paths[0], &paths[1]);
    let sealed = writer.finish("{}").expect("seals");
    let joined = fs::read(&paths[0]).expect("reads");
    fs::write(folder.path().join("b.store.partial/tokens"), &joined).expect("writes");
    let (writer, _) = resume(&paths[1], false).expect("saved");
    assert_eq!(
        writer.finish("{}").expect("seals").digest(),
        sealed.digest()
    );
    assert_eq!(fs::read(&paths[1]).expect("reads"), joined);
    assert_eq!(sealed.digest(), store(&fixed(5)).digest());
}

/// Names that are no writer's are left where they are.
#[test]
fn foreign_files_in_the_folder_stay() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.store");
    let foreign = folder.path().join("a.store.partial/mine.txt");
    fs::create_dir(foreign.parent().expect("folder")).expect("creates");
    fs::write(&foreign, "mine").expect("writes");
    fill(create(&path, false), &fixed(2));
    assert_eq!(fs::read_to_string(&foreign).expect("stays"), "mine");
    let mut writer = create(&path, true);
    let outcome = writer.push_many(&logratio::store::Bulk {
        prompt_ids: &[1],
        prompt_lengths: &[1],
        completion_ids: &[2],
        completion_mask: &[1],
        completion_lengths: &[1],
        group_sizes: &[1],
        roles: &[3],
        values: &[],
        files: &[0],
        lines: &[1],
    });
    assert_eq!(outcome.expect("right"), [Outcome::Kept]);
}
