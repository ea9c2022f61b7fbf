"""What a command will need, said before it starts."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from logratio.errors import LogratioError


@dataclass(frozen=True)
class Forecast:
    """Estimates, from counts of parameters and tokens and a short measurement of the machine.

    Attributes:
        memory_bytes: resident at the peak, on the device that computes.
        disk_bytes: written in all.
        disk_path: where, to compare with what is free.
        seconds: of computing.
        notes: what the estimate rests on.
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
    """Refuse an output folder that cannot be written to or is too full, before anything long.

    Creates nothing: a folder that does not exist is judged by the nearest one that does.

    Raises:
        OutputError: with the path and the reason.
    """
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise OutputError(f"{folder}: cannot write here ({parent} is a file)")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: cannot write here (no permission to write to {parent})")
    if (free := shutil.disk_usage(parent).free) < needed_bytes:
        raise OutputError(f"{folder}: needs {size(needed_bytes)}, and {size(free)} are free")


def existing_parent(path: Path) -> Path:
    """Return the nearest folder of `path` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
