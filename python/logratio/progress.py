"""Progress of work that takes more than two seconds: a bar on a terminal, lines in a log."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from threading import Thread
from typing import TypeVar

from logratio.setting_names import worded

PATIENCE = 2.0
"""Seconds before progress is shown."""
LINE_EVERY = 10.0
"""Seconds between lines if standard error is not a terminal."""

Advance = Callable[..., None]
Result = TypeVar("Result")


_silent = False


def be_silent() -> None:
    """Print no more notes from this process: another one of the same run prints them."""
    global _silent
    _silent = True


def is_silent() -> bool:
    """Return whether another process of the run prints the notes."""
    return _silent


def say(message: str, *, urgent: bool = False) -> None:
    """Print a line on standard error; ignore errors, for example if it is closed.

    Args:
        message: The line.
        urgent: Print it even after `be_silent`.
    """
    if _silent and not urgent:
        return
    with suppress(OSError, ValueError):
        sys.stderr.write(worded(message) + "\n")
        sys.stderr.flush()


@contextmanager
def progress(
    what: str, total: float, unit: str, *, show: bool = True, done: float = 0.0
) -> Iterator[Advance]:
    """Show the progress of a long job, with its rate and the time left.

    Args:
        what: A short description of the job.
        total: Amount of work, in units.
        unit: Name of the unit.
        show: Whether to show anything.
        done: Amount of work that an earlier process did; it counts for no rate.

    Yields:
        advance(amount, note=""): Call it after each piece of work, with the units done and a short
        status.
    """
    if not show:
        yield lambda amount, note="": None
    elif sys.stderr.isatty():
        with _bar(what, total, unit, done) as advance:
            yield advance
    else:
        yield _Lines(what, total, unit, done).advance


@contextmanager
def reading_progress(*, show: bool = True) -> Iterator[Callable[[int, int, int], None]]:
    """Show the progress of reading data.

    Yields:
        report(rows, position, size): The callback for `build_store`, with the rows read, and the
        position and total size in bytes; a `size` of 0 is unknown.
    """
    with ExitStack() as stack:
        bars: list[Advance] = []
        done = 0

        def report(rows: int, position: int, size: int) -> None:
            nonlocal done
            if not bars:
                bar = progress("reading", size or math.inf, "B", show=show)
                bars.append(stack.enter_context(bar))
            bars[0](position - done, f"{rows:,} rows")
            done = position

        yield report


@contextmanager
def _bar(what: str, total: float, unit: str, before: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        TextColumn("{task.fields[note]}"),
    )
    start = time.monotonic()
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=total, completed=int(before), rate="", note="")
    done = before

    def advance(amount: float, note: str = "") -> None:
        nonlocal done
        done += amount
        seconds = time.monotonic() - start
        if seconds > PATIENCE and not bar.live.is_started:
            bar.start()
        rate = f"{(done - before) / max(seconds, 1e-9):,.1f} {unit}/s"
        bar.update(task, completed=done, rate=rate, note=note)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


class _Lines:
    """Prints a line every ten seconds, for logs."""

    def __init__(self, what: str, total: float, unit: str, before: float) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.before = self.done = before
        self.start = self.last = time.monotonic()

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last < LINE_EVERY:
            return
        self.last = now
        rate = (self.done - self.before) / (now - self.start)
        left = (self.total - self.done) / rate if rate else float("inf")
        say(
            f"{self.what}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, {rate:,.1f}/s, "
            f"{left:,.0f} s left {note}"
        )


def awaited(what: str, act: Callable[[], Result]) -> Result:
    """Run a long call without progress information, and show that it is still running.

    The call runs in a daemon thread. Python handles Ctrl-C only after compiled code returns; this
    way it interrupts the wait immediately, and the call stops with the process.

    Args:
        what: A short description of the call.
        act: The call; its exceptions are raised here.

    Returns:
        The result of the call.
    """
    future: Future[Result] = Future()
    Thread(target=_set_result, args=(future, act), daemon=True).start()
    wait([future], PATIENCE)
    if not future.done():
        (_spin if sys.stderr.isatty() else _report_alive)(what, future)
    return future.result()


def _set_result(future: "Future[Result]", act: Callable[[], Result]) -> None:
    try:
        future.set_result(act())
    except BaseException as error:
        future.set_exception(error)


def _spin(what: str, future: "Future[Result]") -> None:
    from rich.console import Console

    with Console(stderr=True).status(what):
        wait([future])


def _report_alive(what: str, future: "Future[Result]") -> None:
    start = time.monotonic() - PATIENCE
    while not future.done():
        say(f"{what}: {time.monotonic() - start:,.0f} s so far")
        wait([future], LINE_EVERY)
