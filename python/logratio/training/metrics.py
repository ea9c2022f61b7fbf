"""What a run reports, under the names that dashboards know."""

import errno
import json
import os
import socket
import struct
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from logratio.progress import say

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """`metrics.jsonl` and TensorBoard's events in the output folder, one row an update.

    A log never stops a run: what cannot be written is reported once, waits in memory, and is
    written as soon as there is room. Without tensorboardX there are no events.
    """

    def __init__(self, output: Path, resume_step: int) -> None:
        self._reported = False
        rows = output / METRICS_FILE
        self._rows = _Appended(rows, _size_up_to(rows, resume_step))
        self._events = _new_events(output / "tensorboard", resume_step)

    @property
    def _files(self) -> list["_Appended"]:
        return [self._rows, self._events] if self._events else [self._rows]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row; every number is finite or the trainer has stopped before."""
        self._rows.add((json.dumps({"step": step, **values}) + "\n").encode())
        scalars = [{"tag": name, "simple_value": value} for name, value in values.items()]
        if self._events:
            self._events.add(_event(step=step, summary={"value": scalars}))
        for file in self._files:
            if (failure := file.failure) and not self._reported:
                self._reported = True
                reason = failure.strerror or failure
                say(
                    f"{file.path}: cannot be written ({reason}); the run goes on, and metrics are "
                    "written once there is room"
                )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
            if file.waiting:
                say(f"{file.path}: incomplete, its last {len(file.waiting):,} records are missing")


class _Appended:
    """A file that grows by whole records; one that cannot be written waits for the next try.

    Attributes:
        failure: why the last try failed, if it did.
        waiting: records that are not in the file yet.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._size = path, size
        self.failure: OSError | None = None
        self.waiting: deque[bytes] = deque()
        self._file: int | None = None

    def add(self, record: bytes) -> None:
        """Append a record, after those that wait."""
        self.waiting.append(record)
        try:
            self._append()
            self.failure = None
        except OSError as error:
            self.failure = error

    def _append(self) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._file, self._size)
        while self.waiting:
            record = self.waiting[0]
            if os.pwrite(self._file, record, self._size) < len(record):
                with suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._size += len(record)
            self.waiting.popleft()

    def close(self) -> None:
        """Try once more, and close the file."""
        with suppress(OSError):
            self._append()
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)


def _new_events(folder: Path, resume_step: int) -> _Appended | None:
    """Begin a file of TensorBoard's events; say so and return None where tensorboardX fails."""
    try:
        from tensorboardX.proto.event_pb2 import SessionLog
    except Exception as error:  # a protobuf of another age raises errors of many types
        reason = str(error).partition("\n")[0]
        say(f"no TensorBoard events ({reason}); {METRICS_FILE} has every metric")
        return None
    # No thread and no queue: tensorboardX's own writer blocks for ever once its thread dies.
    events = _Appended(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}", 0)
    events.add(_event(file_version="brain.Event:2"))
    started = SessionLog(status=SessionLog.START)
    events.add(_event(step=resume_step + 1, session_log=started))
    return events


def _event(**fields: Any) -> bytes:
    """Return an event as a record of TensorBoard's files: length and data, each checksummed."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data: bytes = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checks[0] + data + checks[1]


def _size_up_to(path: Path, step: int) -> int:
    """Return the bytes of the rows that a resumed run keeps: the updates it will not repeat."""
    size = 0
    try:
        lines = path.read_bytes().splitlines(keepends=True) if step else []
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            size += len(line)
    except (OSError, ValueError, KeyError, TypeError):  # what follows a damaged row is made anew
        return size
    return size
