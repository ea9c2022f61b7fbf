"""Ends a run that is stuck, in a collective, a file system or a callback, instead of waiting on.

The work reports each step with `StallGuard.moved`; a separate thread looks how long ago that was.
faulthandler's own timer is not used: it also counts the time in which the process is suspended,
and so would end a healthy run of a scheduler that suspends jobs.
"""

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import NoReturn

import torch

from logratio.data.feed import MicroBatch
from logratio.progress import say

ON_GPU = 1800.0
"""Default of `stall_timeout` on a GPU, in seconds, as torch's for collectives of gloo."""
PATIENT = 10
"""An evaluation, a save or the loading of a model may report this many times more rarely."""
EXIT_CODE = 1
_LOOK_EVERY = 1.0
_GRACE = 5.0
"""Seconds for writing the stacks, after which the process ends without them."""


class StallGuard:
    """Ends the process if its work reports nothing for too long.

    Args:
        seconds: Longest time without a report; 0: the guard does nothing.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = self._allowed = seconds
        self._phase, self._reports = "at the start", 0

    @classmethod
    def of(cls, wanted: float | None, device: torch.device) -> "StallGuard":
        """Return the guard of a run; on a CPU, where a micro-batch can take hours, off by default.

        Args:
            wanted: The setting `stall_timeout`.
            device: The device that computes.
        """
        default = 0.0 if device.type == "cpu" else ON_GPU
        return cls(default if wanted is None else wanted)

    def enter(self, phase: str, *, patient: bool = False) -> None:
        """Report that a phase begins.

        Args:
            phase: Its name, as in "during update 12".
            patient: Allow `PATIENT` times as long between two reports.
        """
        self._phase, self._allowed = phase, self._seconds * (PATIENT if patient else 1)
        self.moved()

    def moved(self) -> None:
        """Report that the work goes on."""
        self._reports += 1

    def counted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield micro-batches, and report each; keep none, since their buffers are used again."""

        def reported(batch: MicroBatch) -> MicroBatch:
            self.moved()
            return batch

        return map(reported, batches)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the work in the block."""
        ended = Event()
        if self._seconds:
            self.moved()
            Thread(target=self._watch, args=(ended,), name="logratio-stalls", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: Event) -> None:
        """Count the seconds since the last report, in small steps: see the module."""
        step = min(_LOOK_EVERY, self._seconds / 4)
        seen, waited = self._reports, 0.0
        while not ended.wait(step):
            waited += step
            if self._reports != seen:
                seen, waited = self._reports, 0.0
            elif waited >= self._allowed:
                end_process(f"{self._phase}, nothing moved for {waited:,.0f} s")


def _own_rank() -> str:
    """Name this process if there are several; another one may be the cause."""
    rank = os.environ.get("RANK")
    return f" (rank {rank} waited, perhaps for another one)" if rank else ""


def end_process(reason: str) -> NoReturn:
    """Print the reason and the stacks of all threads, and end the process at once.

    Nothing else of the process may run: whatever is stuck would be waited for.
    """
    writer = Thread(target=_print_stacks, args=(reason,), daemon=True)
    writer.start()  # standard error may be stuck, too
    writer.join(_GRACE)
    os._exit(EXIT_CODE)


def _print_stacks(reason: str) -> None:
    say(
        f"error: {reason}: the run is stuck, and ends{_own_rank()}. The stacks of all threads "
        "follow; the longest is usually the main one. --resume continues from the last checkpoint, "
        "if there is one; --stall-timeout changes the time",
        urgent=True,
    )
    faulthandler.dump_traceback(2)
