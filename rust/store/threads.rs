//! Work on ranges, shared out to as many threads as the machine runs at once.

use std::{num::NonZero, ops::Range, panic, thread};

/// Cuts `0..count` into one range a thread, none below `least` but the last, and returns what
/// `work` made of each, in order.
pub fn in_parallel<T: Send>(
    count: usize,
    least: usize,
    work: impl Fn(Range<usize>) -> T + Sync,
) -> Vec<T> {
    let at_once = thread::available_parallelism().map_or(1, NonZero::get);
    let size = count.div_ceil(at_once).max(least).max(1);
    let mut ranges = (0..count)
        .step_by(size)
        .map(|start| start..count.min(start + size));
    let mine = ranges.next_back();
    thread::scope(|scope| {
        let work = &work;
        let others: Vec<_> = ranges
            .map(|range| scope.spawn(move || work(range)))
            .collect();
        let own = mine.map(work); // this thread works too
        let joined = others.into_iter().map(thread::ScopedJoinHandle::join);
        let results = joined.map(|one| one.unwrap_or_else(|cause| panic::resume_unwind(cause)));
        results.collect::<Vec<_>>().into_iter().chain(own).collect()
    })
}
