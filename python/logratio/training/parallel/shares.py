"""The micro-batches of each update that fall to this process."""

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import groupby

import numpy as np
import torch

from logratio.data.feed import Feed, MicroBatch
from logratio.training.parallel.processes import Processes


def updates_of(
    feed: Feed, processes: Processes, first: int, last: int
) -> Generator[tuple[int, Iterator[MicroBatch]], None, None]:
    """Yield the micro-batches of each update from number `first`, from 0, to `last`, exclusive.

    An update may have fewer groups than there are processes, so a process may get none of it.

    Args:
        feed: This process's share of the data, at the position before update `first`.
        processes: The processes of the run.
        first: Number of updates done.
        last: Number of updates of the whole run.

    Yields:
        The largest number of micro-batches that any process has, and this process's own.
    """
    most = np.empty(0, dtype=np.int64)
    with closing(iter(feed)) as batches:
        found = groupby(batches, _place)
        ahead = next(found, None)
        for step in range(first, last):
            epoch, update = divmod(step, feed.updates_per_epoch)
            if update == 0 or step == first:
                most = _largest_counts(feed, epoch, processes)
            if ahead and ahead[0] == (epoch, update):
                yield int(most[update]), ahead[1]
                ahead = next(found, None)
            else:
                yield int(most[update]), iter(())


def _largest_counts(feed: Feed, epoch: int, processes: Processes) -> np.ndarray:
    """Return the largest number of micro-batches of any process, for each update of an epoch."""
    plan = feed.settings.plan(feed.store, epoch, feed.rank, feed.world_size)
    counts = np.diff(plan.update_offsets).astype(np.int64)
    largest: np.ndarray = processes.most(torch.from_numpy(counts)).numpy()
    return largest


def _place(micro: MicroBatch) -> tuple[int, int]:
    return micro.epoch, micro.update
