"""One thread that computes, and a bounded queue in front of it."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from logratio.serving.limits import Limits
from logratio.serving.refusals import RefusedError

Result = TypeVar("Result")


class Worker:
    """Runs work off the event loop, one piece at a time; ONNX Runtime uses all cores for each.

    A place in the queue is given back when the work has really ended, not when its client has
    gone: the thread may still be busy with it.
    """

    def __init__(self, limits: Limits) -> None:
        self._places = threading.BoundedSemaphore(limits.queue)
        self._seconds = limits.seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="logratio")

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns.

        Raises:
            RefusedError: 429 when the queue is full, 504 when time is up; work that has not begun
                by then, or whose client has gone, is dropped.
        """
        if not self._places.acquire(blocking=False):
            raise RefusedError(429, "queue_full", "the server is busy; try again shortly")
        deadline = time.monotonic() + self._seconds
        future = self._thread.submit(_unless_late, work, deadline)
        future.add_done_callback(lambda _: self._places.release())
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise RefusedError(504, "deadline", "the time for this request is up") from None

    def close(self) -> None:
        """Let the running work end and take no more."""
        self._thread.shutdown(cancel_futures=True)


def _unless_late(work: Callable[[], Result], deadline: float) -> Result:
    if time.monotonic() > deadline:
        raise TimeoutError
    return work()
