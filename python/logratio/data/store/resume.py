"""Where a long reading stood when it was last made durable."""

import glob
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from logratio._rust import StoreWriter

EVERY = 10.0
"""Seconds between two checkpoints."""


@dataclass(frozen=True, slots=True)
class Position:
    """All that is needed to go on.

    Attributes:
        identity: What must be equal for the rest to be the rest of the same store.
        input: Number of the container that is being read.
        mark: Where in it, as `Rows.mark` said.
        report: The account so far, as `DataReport.to_dict` gave it.
        decoder: What the rows of each file were, as `Decoder.state` said.
        files: Names of the containers in the order of their numbers.
        log_bytes: Length of the list of refused rows.
    """

    identity: Mapping[str, Any]
    input: int
    mark: Mapping[str, Any]
    report: Mapping[str, Any]
    decoder: Mapping[str, Any]
    files: list[str]
    log_bytes: int


class Checkpoints:
    """Saves a position from time to time.

    Args:
        writer: What has been written so far becomes durable with each.
        log: The list of refused rows, which becomes durable too.
    """

    def __init__(self, writer: StoreWriter, log: IO[str] | None) -> None:
        self._writer = writer
        self._log = log
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Say whether it is time."""
        return time.monotonic() - self._last >= EVERY

    def log_bytes(self) -> int:
        """Make the list of refused rows durable; return its length."""
        if self._log is None:
            return 0
        self._log.flush()
        os.fsync(self._log.fileno())
        return os.fstat(self._log.fileno()).st_size

    def save(self, position: Position) -> None:
        """Make the position durable, and everything before it."""
        self._writer.checkpoint(json.dumps(asdict(position)))
        self._last = time.monotonic()


def is_saved(path: Path) -> bool:
    """Say whether an unfinished store, settled or not, can be taken up again."""
    return any(path.parent.glob(f"{glob.escape(path.name)}*.partial/progress"))


def resumed(
    path: Path,
    identity_at: Callable[[Position], Mapping[str, Any]],
    log: Path | str | None,
    *,
    deduplicate: bool,
) -> tuple[StoreWriter, Position] | str:
    """Take up an unfinished store.

    Args:
        path: Where it is to be.
        identity_at: Returns what must be equal for the rest to be the rest of it.
        log: Its list of refused rows, which must hold what it held then.
        deduplicate: As the writer was told before.

    Returns:
        Its writer and position, or why it begins anew.
    """
    try:
        found = StoreWriter.resume(path, deduplicate=deduplicate)
    except ValueError as error:
        return f"{path}: begins anew: {error}"
    if found is None:
        return ""
    writer, note = found
    position = Position(**json.loads(note))
    identity = identity_at(position)
    differing = [name for name in identity if identity[name] != position.identity.get(name)]
    if differing:
        return f"{path}: begins anew, since what was read before had other {', '.join(differing)}"
    if log and not _holds(Path(log), position.log_bytes):
        return f"{path}: begins anew, since {log} no longer lists the rows refused before"
    return writer, position


def _holds(log: Path, length: int) -> bool:
    return log.is_file() and log.stat().st_size >= length


def open_log(path: Path | str, position: Position | None) -> IO[str]:
    """Open the list of refused rows, cut to where the position found it."""
    if position is None:
        return Path(path).open("w", encoding="utf-8")
    os.truncate(path, position.log_bytes)
    return Path(path).open("a", encoding="utf-8")
