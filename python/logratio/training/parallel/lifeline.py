"""How the processes of a run end together when one of them fails, dies or hangs.

Each process counts in torch's key-value store, from a separate thread. A process that fails
writes why. A process that no longer counts is dead, or stopped: the first process watches all
others, and the second one the first. Once a failure is known, every process has `GRACE` seconds to
end by itself (torch's collectives usually fail at once), then its thread ends it. Only a process of
another program (a worker of Ray) stays once it has raised its error, which that program collects.
"""

import atexit
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any, NoReturn

from logratio.errors import LogratioError
from logratio.progress import say

BEAT = 0.5
"""Seconds between two numbers."""
STALE = 12.0
"""Seconds without a new number after which a process counts as dead."""
GRACE = 5.0
"""Seconds that a process has to end after a failure of any process."""
ENDED = -1
"""The number of a process that has ended as it should."""
BLAME = 4.0
"""Seconds in which a process whose collective failed looks for the one that caused it."""


class PeerFailedError(LogratioError, RuntimeError):
    """Another process of the run failed, and its message has been printed.

    Attributes:
        exit_code: Exit code for this process.
        is_printed: Whether the message has been printed by another process.
    """

    exit_code = 1
    is_printed = True


class LostProcessError(LogratioError, RuntimeError):
    """A process of the run died or stopped; the message names it."""


class Lifeline(Thread):
    """Counts for this process, and ends it if another one has failed.

    Args:
        rank: Rank of this process.
        count: Number of processes.
        store: torch's key-value store.
        is_guest: Whether the process belongs to another program, which collects its errors.

    Attributes:
        phase: What this process does now, as in "during update 12".
    """

    def __init__(self, rank: int, count: int, store: Any, *, is_guest: bool = False) -> None:
        super().__init__(name="logratio-lifeline", daemon=True)
        self._rank, self._count, self._store, self._is_guest = rank, count, store, is_guest
        self._numbers: dict[int, tuple[int | None, float]] = {}
        self._failure: str | None = None
        self._ended = Event()
        self.phase = "at the start"
        self._beat(0)
        atexit.register(self.end)

    def run(self) -> None:
        """Count, watch, and end the process after a failure; called by `start`."""
        number, watched = 0, self._watched()
        try:
            while not self._ended.wait(BEAT):
                number += 1
                self._beat(number)
                if self.failure():
                    break
                for rank in watched if number % 4 == 0 else ():
                    if (dead := self._look(rank, STALE)) and self.report(dead):
                        say(f"error: {dead}", urgent=True)
        except Exception:  # the process that keeps the store has ended
            if self._ended.is_set():
                return
        self._leave()

    def _watched(self) -> list[int]:
        """Return the ranks that this process watches."""
        return [*range(1, self._count)] if self._rank == 0 else [0] if self._rank == 1 else []

    def _beat(self, number: int) -> None:
        mine = {"number": number, "phase": self.phase, "process": os.getpid()}
        self._store.set(f"{self._rank}", json.dumps(mine | {"host": socket.gethostname()}))

    def _look(self, rank: int, stale: float) -> str | None:
        """Describe a process that has not counted for `stale` seconds, and record its failure."""
        if not self._store.check([f"{rank}"]):
            return None  # it has not begun yet; its launcher knows if it never does
        state, now = json.loads(self._store.get(f"{rank}")), time.monotonic()
        before, since = self._numbers.get(rank, (None, now))
        if state["number"] != before:
            self._numbers[rank] = state["number"], now
        elif state["number"] != ENDED and now - since > stale:
            where = f"rank {rank} (host {state['host']}, process {state['process']})"
            return f"{where} died or stopped {state['phase']}"
        return None

    def failure(self) -> str | None:
        """Return the message of the first failure of any process, or None.

        Once seen, it is known without the store, which may end with the process that keeps it.
        """
        if self._failure is None and self._store.check(["failure"]):
            self._failure = str(json.loads(self._store.get("failure"))["message"])
            self._store.set(f"knows{self._rank}", "")
        return self._failure

    def report(self, message: str) -> bool:
        """Record a failure of this process; return whether it is the first one of the run."""
        if self._failure is not None:
            return False
        mine = json.dumps({"rank": self._rank, "message": message})
        with suppress(Exception):
            return bool(self._store.compare_set("failure", "", mine).decode() == mine)
        return self._rank == min(1, self._count - 1)  # the store has died with the first process

    def culprit(self) -> str | None:
        """Look for a dead process for at most `BLAME` seconds, after a collective has failed.

        Returns:
            A sentence about it; None if none was found, or if a process has reported a failure.
        """
        watched = self._watched()
        end = time.monotonic() + (BLAME if watched else BLAME + 2)
        while time.monotonic() < end:
            try:
                if self.failure():
                    return None
                for rank in watched:
                    if found := self._look(rank, BLAME - 1):
                        return found
            except Exception:
                return "rank 0, which keeps the common store, died or stopped"
            time.sleep(BEAT)
        return None

    @property
    def has_ended(self) -> bool:
        """Whether this process counts no more: it is about to end, or has raised an error."""
        return self._ended.is_set()

    def hand_over(self) -> None:
        """Leave this process, which raises an error, to the program that it belongs to, if any."""
        if self._is_guest:
            self._ended.set()

    def follow(self) -> None:
        """Wait, after a failure, until this process may end without harm to the others.

        Once one process has ended, its launcher may cut off the end of the first one; and the first
        one may keep the store, from which the others learn of the failure.
        """
        if self._is_guest:
            return  # its program looks for errors, and ends the others
        others = [f"knows{rank}" for rank in range(1, self._count)]
        end = time.monotonic() + GRACE
        with suppress(Exception):
            while time.monotonic() < end:
                if self._has_first_ended() if self._rank else self._store.check(others):
                    return
                time.sleep(BEAT / 5)

    def _has_first_ended(self) -> bool:
        return bool(json.loads(self._store.get("0")).get("number") == ENDED)

    def end(self) -> None:
        """Stop counting; from now on a silence is no failure."""
        self._ended.set()
        with suppress(Exception):
            self._store.set(f"{self._rank}", json.dumps({"number": ENDED}))
            self._store.set(f"knows{self._rank}", "")  # nobody need wait for it

    def _leave(self) -> None:
        """End this process, unless it ends by itself."""
        if not self._ended.wait(GRACE):
            os._exit(1)


@contextmanager
def ending_together(lifeline: Lifeline | None, rank: int) -> Iterator[None]:
    """Let all processes of a run end, with one message, if the block fails in one of them.

    Args:
        lifeline: The process's lifeline; None for a process alone.
        rank: Rank of this process, for a note at its errors.

    Raises:
        LostProcessError: A collective failed because a process has died.
        PeerFailedError: A collective failed because a process has failed and printed its message.
    """
    try:
        yield
    except Exception as error:
        if lifeline is None or isinstance(error, PeerFailedError):
            raise
        try:
            _blame(error, lifeline, rank)
        finally:
            lifeline.hand_over()


def _blame(error: Exception, lifeline: Lifeline, rank: int) -> NoReturn:
    """Raise the error, or one that names the process that has caused it, and record it."""
    if isinstance(error, LogratioError | OSError | TypeError) or not _is_collective(error):
        error.add_note(f"rank {rank}, host {socket.gethostname()}")
        error.is_printed = not lifeline.report(str(error))  # type: ignore[attr-defined]
        lifeline.follow()
        raise error
    lost = lifeline.culprit() or f"the processes lost each other: {error}"
    if lifeline.report(lost):
        raise LostProcessError(lost) from error
    raise PeerFailedError(lifeline.failure() or lost) from error


def _is_collective(error: Exception) -> bool:
    """Return whether an error may come from a collective operation of several processes."""
    words = ("gloo", "nccl", "connection", "peer", "process group", "timed out", "socket", "store")
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in words)
