//! Independent stretches of one slice, worked on by several threads.

use std::thread;

/// Items below which a thread costs more than it saves.
const WORTHWHILE: usize = 1 << 15;

/// More threads than these wait for memory.
const MOST: usize = 8;

/// Calls `work` on each stretch of `size` items (the last may be shorter), in no order.
pub(super) fn each<T: Send>(items: &mut [T], size: usize, work: impl Fn(&mut [T]) + Sync) {
    map(items, size, |part| part.chunks_mut(size).for_each(&work));
}

/// Splits `items` at multiples of `size` into one part a thread; the results in the parts' order.
pub(super) fn map<T: Send, R: Send>(
    items: &mut [T],
    size: usize,
    work: impl Fn(&mut [T]) -> R + Sync,
) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let wanted = threads.min(MOST).min(items.len() / WORTHWHILE).max(1);
    let stretches = items.len().div_ceil(size).div_ceil(wanted).max(1);
    let part = stretches.saturating_mul(size);
    if wanted == 1 || part >= items.len() {
        return vec![work(items)];
    }
    thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = items
            .chunks_mut(part)
            .map(|part| scope.spawn(move || work(part)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, R>| thread.join().expect("no panic");
        running.into_iter().map(join).collect()
    })
}
