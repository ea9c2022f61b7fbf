"""The HTML report of a run, written by another process: drawing does not delay or stop the run."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from logratio.progress import say
from logratio.report import REPORT_FILE
from logratio.report.pictures import can_draw

OFF = "LOGRATIO_NO_REPORT"
"""Environment variable that turns reports off, for many short runs."""
EVERY = 60.0
"""Seconds between the starts of two drawings, and before the first one."""
PATIENCE = 20.0
"""Seconds that the end of a run waits for its report."""
SHORT_PATIENCE = 5.0
"""Seconds that a run which an exception ends waits for an earlier drawing."""
_abandoned: list[subprocess.Popen[bytes]] = []
_CODE = """
import os, sys
os.nice(19)
if hasattr(os, "SCHED_IDLE"):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
from logratio.cli.app import main
main(["report", sys.argv[1], "--quiet"])
"""
"""Draws only while the run leaves a core idle: an ordinary process made updates on two cores 1.2
times as long while it drew."""


class Drawing:
    """The report of a run; at most one process draws it at a time.

    Args:
        output: The output folder.
        wanted: Whether a report is wanted. Otherwise no method does anything.
    """

    def __init__(self, output: Path, *, wanted: bool) -> None:
        self._output = output
        self._is_on = wanted and not os.environ.get(OFF)
        self._process: subprocess.Popen[bytes] | None = None
        self._started = time.monotonic()
        self._has_failed = False

    def announce(self) -> None:
        """Print a note if the report will have no pictures."""
        if self._is_on and not can_draw():
            say(
                f"{self._output / REPORT_FILE} will have tables only: "
                "pip install 'logratio[plots]' adds its pictures"
            )

    def request(self) -> None:
        """Write the report from the files as they are, unless this was done a short time ago."""
        if time.monotonic() - self._started >= EVERY and self._is_idle():
            self._start()

    def _is_idle(self) -> bool:
        """Return whether no process draws; print the first failure of one."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            return False
        reason = b""
        if self._process.stderr:
            with self._process.stderr as pipe:
                reason = pipe.read().strip()
        if self._process.returncode and not self._has_failed:
            self._has_failed = True
            last = reason.decode(errors="replace").splitlines()[-1:] or ["no reason given"]
            say(f"{REPORT_FILE} could not be written ({last[0]}); the run is not affected")
        self._process = None
        return True

    def _start(self, errors: int = subprocess.PIPE) -> None:
        if not self._is_on:
            return
        self._started = time.monotonic()
        command = [sys.executable, "-W", "ignore", "-c", _CODE, str(self._output)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for the run only
            )
        except OSError as error:
            self._is_on = False
            say(f"{REPORT_FILE} is not written: no process can be started ({error})")

    def leave(self) -> None:
        """Write the report of a run that an exception ends; the process may outlive this one."""
        self._wait(time.monotonic() + SHORT_PATIENCE)
        if self._is_idle():
            self._start(subprocess.DEVNULL)
        self._abandon()

    def _abandon(self) -> None:
        """Keep the process out of the garbage collector, which warns of running processes."""
        if self._process:
            if self._process.stderr:
                self._process.stderr.close()
            _abandoned.append(self._process)

    def finish(self) -> None:
        """Write the last report, and wait for it, but not longer than `PATIENCE`."""
        deadline = time.monotonic() + PATIENCE
        self._wait(deadline)
        if self._is_idle():
            self._start()
            self._wait(deadline)
        if not self._is_idle():
            self._abandon()
            say(f"{REPORT_FILE} is still being written; `logratio report` writes it again")

    def _wait(self, deadline: float) -> None:
        if self._process:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline - time.monotonic()))
