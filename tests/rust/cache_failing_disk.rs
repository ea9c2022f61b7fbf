//! F08, F09, F10: the disk is full, fails at the n-th call or may not be written, for every n.

mod sim;

use std::{
    io::ErrorKind,
    path::Path,
    sync::{Arc, atomic::AtomicUsize},
};

use logratio::{
    Error,
    cache::{Cache, ReadMode},
};
use sim::{
    SimDisk,
    chance::{Chance, for_seeds},
    failing::{Call, Plan},
    life::{FOLDERS, Life},
};

const STEPS: usize = 24;
const SEEDS: std::ops::Range<usize> = 0..9;

/// A cache with something in it, and the plan that its further life meets.
fn life(seed: u64, plan: Plan) -> Life {
    let mut life = Life::new(SimDisk::default(), seed);
    life.steps(STEPS / 2).expect("nothing fails yet");
    life.disk.fail(plan);
    life
}

/// Lives of a seed that fail in the same way at the first, second, third… call, until one has fewer
/// calls than that. `after` gets what remains to be done behind the error.
fn for_every_call(
    seed: u64,
    plan: impl Fn(usize) -> Plan,
    after: impl Fn(Life, Option<Error>, usize),
) -> u64 {
    for at in 0.. {
        let mut life = life(seed, plan(at));
        let (mut left, mut error) = (STEPS, None);
        while left > 0 && error.is_none() {
            left -= 1;
            error = life.step().err();
        }
        let reached = life.disk.calls() > at;
        after(life, error, left);
        if !reached {
            return at as u64;
        }
    }
    unreachable!("every life ends")
}

/// From here on nothing fails. Nothing acknowledged is lost, now or when power goes too; a new writer goes on, and what the
/// failure left behind is tidied up.
fn check(mut life: Life) {
    life.disk.fail(Plan::default());
    life.check_all();
    let state = life.disk.state();
    let mut chance = life.chance.clone();
    for _ in 0..4 {
        let disk = SimDisk::after_power_loss(&state, &mut chance);
        life.check(&disk, state.acknowledged);
    }
    life.drop_writers();
    life.recover();
    life.check_all();
    life.check_tidy();
}

#[test]
fn a_call_that_fails_once_loses_nothing() {
    for takes_effect in [false, true] {
        let calls = for_seeds(SEEDS, |seed| {
            let plan = |at| Plan {
                fail_at: Some(at),
                takes_effect,
                ..Plan::default()
            };
            for_every_call(seed, plan, |mut life, _, left| {
                life.steps(left).expect("it fails but once");
                check(life);
            })
        });
        assert!(calls > 800, "only {calls} calls");
    }
}

#[test]
fn a_disk_that_fails_for_ever_loses_nothing() {
    let calls = for_seeds(SEEDS, |seed| {
        let plan = |at| Plan {
            fail_at: Some(at),
            for_ever: true,
            ..Plan::default()
        };
        for_every_call(seed, plan, |mut life, _, _| {
            life.drop_writers();
            check(life);
        })
    });
    assert!(calls > 800, "only {calls} calls");
}

/// Every call that needs room: what there was stays readable, the error says how much room is
/// needed, and the cache goes on when there is room again.
#[test]
fn a_full_disk_at_every_call_loses_nothing() {
    use Call::{Append, Create, CreateFolder, Rename, Sync, SyncFolder};
    for call in [CreateFolder, Create, Append, Sync, Rename, SyncFolder] {
        let calls = for_seeds(SEEDS, |seed| {
            let plan = |at| Plan {
                fail_at: Some(at),
                kind: ErrorKind::StorageFull,
                only: Some(call),
                ..Plan::default()
            };
            for_every_call(seed, plan, |mut life, error, left| {
                if let Some(error) = error {
                    assert_no_space(&error);
                }
                life.steps(left).expect("there is room again");
                check(life);
            })
        });
        assert!(calls > 10, "only {calls} calls");
    }
}

#[test]
fn every_size_of_a_full_disk_loses_nothing() {
    let sizes = for_seeds(SEEDS, |seed| {
        for size in (0..).map(|size| size * 61) {
            let plan = Plan {
                room: AtomicUsize::new(size),
                ..Plan::default()
            };
            let mut life = life(seed, plan);
            let error = life.steps(STEPS).err();
            let is_full = error.is_some();
            if let Some(error) = &error {
                assert_no_space(error);
                life.check_all(); // while it is full
            }
            check(life);
            if !is_full {
                return size as u64 / 61;
            }
        }
        unreachable!("some size is enough")
    });
    assert!(sizes > 300, "only {sizes} sizes");
}

fn assert_no_space(error: &Error) {
    let Error::NoSpace { path, bytes, .. } = error else {
        panic!("not a full disk, but: {error:?}");
    };
    assert!(*bytes > 0);
    let text = error.to_string();
    assert!(text.contains(&format!("{bytes} bytes more")), "{text}");
    assert!(text.contains(path.to_str().expect("a path")), "{text}");
}

/// Whatever may not be done: the error names the file or folder, and nothing is lost.
#[test]
fn what_is_not_permitted_is_named() {
    use Call::{Create, CreateFolder, List, Open, Remove, Rename, SyncFolder};
    for call in [CreateFolder, List, Create, Open, Rename, Remove, SyncFolder] {
        let mut named = 0;
        for seed in 0..20 {
            let plan = Plan {
                fail_at: Some(0),
                for_ever: true,
                kind: ErrorKind::PermissionDenied,
                only: Some(call),
                ..Plan::default()
            };
            let mut life = life(seed, plan);
            if let Err(error) = life.steps(STEPS) {
                let text = error.to_string();
                assert!(text.contains("permission denied"), "{text}");
                assert!(FOLDERS.iter().any(|folder| text.contains(folder)), "{text}");
                named += 1;
            }
            life.drop_writers();
            check(life);
        }
        assert!(named > 0, "nothing needs {call:?}");
    }
}

#[test]
fn a_folder_below_a_file_is_the_systems_error() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("writes");
    let error = Cache::new(file.join("cache"), [7; 32])
        .writer()
        .expect_err("no folder");
    let Error::Io { path, .. } = error else {
        panic!("{error:?}");
    };
    assert!(path.starts_with(&file));
}

/// Who reads needs no permission to write, and no lock.
#[test]
fn a_cache_on_a_read_only_disk_can_be_read() {
    let mut life = Life::new(SimDisk::default(), 4);
    life.steps(40).expect("nothing fails");
    let state = life.disk.state();
    let disk = SimDisk::after_power_loss(&state, &mut Chance(4));
    for call in [
        Call::Create,
        Call::Append,
        Call::Rename,
        Call::Remove,
        Call::Lock,
    ] {
        disk.fail(Plan {
            fail_at: Some(0),
            for_ever: true,
            kind: ErrorKind::ReadOnlyFilesystem,
            only: Some(call),
            ..Plan::default()
        });
        life.check(&disk, state.acknowledged);
        let cache = Cache::new(Path::new(FOLDERS[0]), [7; 32]).on(Arc::new(disk.clone()));
        assert!(
            cache.open(ReadMode::Map).is_ok(),
            "what cannot be mapped is read"
        );
        assert_eq!(disk.calls(), 0, "a reader used {call:?}");
    }
}
