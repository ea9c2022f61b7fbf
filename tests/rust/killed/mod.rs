//! Children of this test binary that write to a cache until they are killed.
#![allow(dead_code)] // each test crate uses its part

use std::{
    env,
    io::{BufRead, BufReader, Lines, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
};

use logratio::cache::Cache;
use tempfile::TempDir;

use crate::{
    journals::{FINGERPRINT, append, block, create},
    sim::chance::Chance,
};

const FOLDER: &str = "LOGRATIO_TEST_CACHE_FOLDER";
const SEED: &str = "LOGRATIO_TEST_CACHE_SEED";
const TASK: &str = "LOGRATIO_TEST_CACHE_TASK";
/// More blocks than a child comes to write.
pub const BLOCKS: u64 = 1 << 20;
/// Journals that a child begins at most.
const JOURNALS: usize = 24;

/// What a child does behind its blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Only appends, in one journal.
    Append,
    /// Also begins new journals and seals old ones.
    Seal,
    /// Also compacts.
    Compact,
}

/// A folder in memory, where there is one: a kill needs no disk, and a sync takes no time.
pub fn folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir());
    folder.expect("a folder")
}

/// Writes until it is killed, and says which blocks were acknowledged; nothing where this process
/// is no child.
pub fn be_a_child() {
    let Ok(folder) = env::var(FOLDER) else {
        return;
    };
    let number = |name| {
        env::var(name)
            .expect("set")
            .parse::<u64>()
            .expect("a number")
    };
    let (seed, task) = (number(SEED), number(TASK));
    let folder = PathBuf::from(folder);
    let mut chance = Chance(seed);
    let mut numbers = seed * BLOCKS..(seed + 1) * BLOCKS;
    for _ in 0..JOURNALS {
        let mut writer = create(&folder);
        let mut out = std::io::stdout();
        writeln!(out, "\nwriter {}", writer.path().display()).expect("the parent listens");
        let blocks = if task == Task::Append as u64 {
            1000
        } else {
            chance.below(6)
        };
        for number in numbers.by_ref().take(blocks) {
            append(&mut writer, &block(number)).expect("appends");
            writeln!(out, "acknowledged {number}").expect("the parent listens");
        }
        if task == Task::Append as u64 {
            thread::park();
        } else if chance.flip() {
            writer.seal().expect("seals");
        }
        if task == Task::Compact as u64 && chance.flip() {
            let cache = Cache::new(&folder, FINGERPRINT);
            cache.compact(false).expect("compacts");
        }
    }
    loop {
        thread::park(); // so that a slow machine's folders do not grow without end
    }
}

/// A child, and what it says.
pub struct Writer {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    /// Starts the test of this binary that calls [`be_a_child`].
    pub fn start(test: &str, folder: &Path, seed: u64, task: Task) -> Self {
        let mut child = Command::new(env::current_exe().expect("this test"))
            .args(["--exact", "--nocapture", test])
            .env(FOLDER, folder)
            .env(SEED, seed.to_string())
            .env(TASK, (task as u64).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, lines }
    }

    /// Waits for its next line with this beginning; the rest of the line.
    pub fn hear(&mut self, beginning: &str) -> String {
        loop {
            let line = self.lines.next().expect("it lives").expect("text");
            if let Some(rest) = line.strip_prefix(beginning) {
                return rest.into();
            }
        }
    }

    /// `kill -9`; the blocks that were acknowledged and not heard yet.
    pub fn kill(mut self) -> Vec<u64> {
        self.child.kill().expect("kills");
        let end = self.child.wait().expect("ends");
        assert_eq!(end.code(), None, "it ended before it was killed");
        // A line that the kill cut short has no end, but then a number may lack digits.
        let mut said = Vec::new();
        for line in self.lines.map_while(Result::ok) {
            said.extend(line.strip_prefix("acknowledged ").map(str::to_owned));
        }
        said.iter()
            .filter_map(|number| number.parse().ok())
            .collect()
    }
}
