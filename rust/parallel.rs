//! Work on several threads, whose results come back in order.
//!
//! A panic in one thread is passed on to the caller.

use std::{
    ops::Range,
    panic,
    thread::{self, ScopedJoinHandle},
};

/// Items of a slice below which a thread costs more than it saves.
const WORTHWHILE: usize = 1 << 15;

/// More threads than these wait for memory.
const MOST: usize = 8;

/// Threads that this machine runs at once, at most `most`.
pub(crate) fn threads(most: usize) -> usize {
    thread::available_parallelism().map_or(1, |count| count.get().min(most))
}

/// Calls `work` on each item, on a separate thread.
pub(crate) fn each<I: Send, T: Send>(items: Vec<I>, work: impl Fn(I) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let start = |item| scope.spawn(move || work(item));
        let running: Vec<_> = items.into_iter().map(start).collect();
        running.into_iter().map(joined).collect()
    })
}

/// Cuts `0..count` into one range a thread, of at least `least` (but the last), and calls `work` on
/// each.
pub(crate) fn ranges<T: Send>(
    count: usize,
    least: usize,
    work: impl Fn(Range<usize>) -> T + Sync,
) -> Vec<T> {
    let size = count.div_ceil(threads(usize::MAX)).max(least).max(1);
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
        others.into_iter().map(joined).chain(own).collect()
    })
}

/// Cuts `items` at multiples of `size` into one part a thread, and calls `work` on each.
pub(crate) fn parts<T: Send, R: Send>(
    items: &mut [T],
    size: usize,
    work: impl Fn(&mut [T]) -> R + Sync,
) -> Vec<R> {
    let wanted = threads(MOST).min(items.len() / WORTHWHILE).max(1);
    let chunks = items.len().div_ceil(size).div_ceil(wanted).max(1);
    let part = chunks.saturating_mul(size);
    if wanted == 1 || part >= items.len() {
        return vec![work(items)];
    }
    each(items.chunks_mut(part).collect(), work)
}

/// Calls `work` on each `size` items (the last may be fewer), in no order.
pub(crate) fn chunks<T: Send>(items: &mut [T], size: usize, work: impl Fn(&mut [T]) + Sync) {
    parts(items, size, |part| part.chunks_mut(size).for_each(&work));
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|cause| panic::resume_unwind(cause))
}
