"""Estimate the resources of a command before it starts."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from logratio.errors import LogratioError


@dataclass(frozen=True)
class Forecast:
    """Estimates from counts of parameters and tokens, and a short benchmark of the machine.

    Attributes:
        memory_bytes: Peak memory on the device that computes.
        disk_bytes: Total bytes written.
        disk_path: The path written to, to report the free space.
        seconds: Compute time.
        notes: The basis of the estimate.
    """

    memory_bytes: float
    disk_bytes: float
    disk_path: Path
    seconds: float
    notes: str = ""

    def to_text(self) -> str:
        """Return one line for the terminal."""
        free = shutil.disk_usage(existing_parent(self.disk_path)).free
        return (
            f"needs about {size(self.memory_bytes)} of memory, {size(self.disk_bytes)} of disk "
            f"({size(free)} free), {duration(self.seconds)}"
            + (f"; {self.notes}" if self.notes else "")
        )


class OutputError(LogratioError, OSError):
    """The output folder cannot be used."""


def check_writable(folder: Path, needed_bytes: float = 0) -> None:
    """Check that an output folder is writable and has enough free space.

    For a folder that does not exist, the nearest existing parent is checked. Leaves nothing behind.

    Raises:
        OutputError: It is not; the message has the path and the reason.
    """
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise OutputError(f"{folder}: cannot write here ({parent} is a file)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot write here (no permission to write to {parent})")
    try:
        # Permissions do not tell of a read-only disk, or of /proc.
        with TemporaryDirectory(prefix=".logratio-", dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{folder}: cannot write here ({parent}: {reason})") from error
    if (free := shutil.disk_usage(parent).free) < needed_bytes:
        raise OutputError(f"{folder}: needs {size(needed_bytes)}, but only {size(free)} are free")


def existing_parent(path: Path) -> Path:
    """Return `path` or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def size(count: float) -> str:
    """Format a number of bytes, for example "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Format a time in seconds, for example "12 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(number: int, noun: str) -> str:
    """Format a number with its noun in singular or plural, for example "1 pair", "2,000 pairs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
