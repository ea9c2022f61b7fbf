"""Metrics of a run in files of its output folder, under the names that TRL uses."""

import errno
import json
import math
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from logratio.errors import LogratioError
from logratio.progress import say
from logratio.report.run_files import EVALUATIONS_FILE, METRICS_FILE, SAMPLES_FILE, SPEED_FILE
from logratio.training.trackers import SAMPLES, dashboard_names, sample_table


def progress_note(metrics: Mapping[str, float]) -> str:
    """Return the metrics of an update that a progress bar shows."""
    note = f"loss {metrics['loss']:.4f}"
    if "rewards/accuracies" in metrics:
        note += f" acc {metrics['rewards/accuracies']:.2f} margin {metrics['rewards/margins']:.3f}"
    return note


class MetricsLog:
    """Writes metrics, evaluations, samples, speed and TensorBoard events to the output folder.

    A failed write never stops a run: it is reported once, and the rows are kept in memory and
    written when the disk has space again. Without tensorboardX, no events are written.
    """

    def __init__(self, output: Path, resume_step: int, *, tensorboard: bool = True) -> None:
        self._reported = False
        _remove_rows(output, resume_step)
        self._rows, self._evaluations, self._samples, self._speed = (
            _Appended(output / name, _size_up_to(output / name, resume_step))
            for name in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE, SPEED_FILE)
        )
        self._events = _new_events(output / "tensorboard", resume_step) if tensorboard else None

    @property
    def _files(self) -> list["_Appended"]:
        rows = [self._rows, self._evaluations, self._samples, self._speed]
        return [*rows, self._events] if self._events else rows

    def write(
        self, step: int, values: Mapping[str, float], speed: Mapping[str, float] | None = None
    ) -> None:
        """Append the row of an update. Its values are finite: the trainer stops on others.

        Args:
            step: Number of updates done.
            values: Its metrics, the same in every run with the same settings on a CPU.
            speed: Its figures of speed and memory, which differ between runs.
        """
        self._rows.add(_line({"step": step, **values}))
        if speed:
            self._speed.add(_line({"step": step, **speed}))
        self._add_scalars(step, {**values, **(speed or {})})

    def write_evaluation(
        self, row: Mapping[str, Any], metrics: Mapping[str, float], samples: Sequence[Any]
    ) -> None:
        """Append an evaluation, with its samples.

        Args:
            row: The row of `evaluations.jsonl`, with the number of updates as `step`.
            metrics: Its scalars, for TensorBoard.
            samples: Rows of `samples.jsonl`.
        """
        self._evaluations.add(_line(row))
        for sample in samples:
            self._samples.add(_line({"step": row["step"], **sample}))
        if samples and self._events:
            self._events.add(_text_event(row["step"], SAMPLES, *sample_table(samples)))
        self._add_scalars(row["step"], metrics)

    def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars to the TensorBoard events, and report the first failure of any file."""
        if self._events:
            named = dashboard_names(values).items()
            scalars = [{"tag": name, "simple_value": value} for name, value in named]
            self._events.add(_event(step=step, summary={"value": scalars}))
        for file in self._files:
            if (failure := file.failure) and not self._reported:
                self._reported = True
                reason = failure.strerror or failure
                say(
                    f"{file.path}: cannot be written ({reason}); the run continues, and metrics "
                    "are written when the disk has space again"
                )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files, after one more attempt to write what is waiting."""
        for file in self._files:
            file.close()
            if file.waiting:
                say(f"{file.path}: incomplete, the last {len(file.waiting):,} records are missing")


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


class _Appended:
    """An append-only file of complete records; failed writes are retried with the next record.

    Attributes:
        failure: The error of the last write, or None.
        waiting: Records that are not yet written.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._size = path, size
        self.failure: OSError | None = None
        self.waiting: deque[bytes] = deque()
        self._file: int | None = None

    def add(self, record: bytes) -> None:
        """Append a record, after any waiting ones."""
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
        """Retry the waiting records once, and close the file."""
        with suppress(OSError):
            self._append()
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)


def _new_events(folder: Path, resume_step: int) -> _Appended | None:
    """Start a TensorBoard event file; print a note and return None if tensorboardX fails."""
    try:
        from tensorboardX.proto.event_pb2 import SessionLog
    except Exception as error:  # an incompatible protobuf raises errors of many types
        reason = str(error).partition("\n")[0]
        say(f"no TensorBoard events ({reason}); {METRICS_FILE} contains all metrics")
        return None
    # tensorboardX's own writer blocks forever if its thread dies (for example on a full disk).
    events = _Appended(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}", 0)
    events.add(_event(file_version="brain.Event:2"))
    started = SessionLog(status=SessionLog.START)
    events.add(_event(step=resume_step + 1, session_log=started))
    return events


def _event(**fields: Any) -> bytes:
    """Encode an event as a TensorBoard record: length and data, each with a checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data: bytes = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checks[0] + data + checks[1]


def _text_event(step: int, name: str, columns: list[str], rows: list[list[str]]) -> bytes:
    """Encode a table as Markdown, which TensorBoard shows among the texts."""
    from tensorboardX.summary import text

    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return _event(step=step, summary=text(name, "\n".join(f"| {' | '.join(c)} |" for c in cells)))


def _remove_rows(output: Path, resume_step: int) -> None:
    """Remove the rows of an earlier run, unless this one continues it."""
    if resume_step == 0:
        for name in (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE, SPEED_FILE):
            with suppress(OSError):
                (output / name).unlink(missing_ok=True)


def _size_up_to(path: Path, step: int) -> int:
    """Return the size in bytes of the rows up to update `step`, which a resumed run keeps."""
    size = 0
    try:
        lines = path.read_bytes().splitlines(keepends=True) if step else []
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            size += len(line)
    except (OSError, ValueError, KeyError, TypeError):  # rows after a damaged one are dropped
        return size
    return size


class NonFiniteError(LogratioError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the weights were not updated with it."""


def not_finite(
    step: int,
    values: Mapping[str, float],
    recent: Sequence[Mapping[str, float]],
    records: str,
    peak: float,
) -> str:
    """Describe the non-finite values of an update, their records and the likely cause.

    Args:
        step: Number of the update.
        values: Its metrics, with the learning rate as `lr`.
        recent: Metrics of the preceding updates.
        records: The records whose log-probs are not finite, as a phrase.
        peak: Peak learning rate of the run.
    """
    bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
    return (
        f"update {step}: {bad} not finite; stopped before updating the weights "
        f"({records}). {_likely_cause(values['lr'], recent, peak)}"
    )


def _likely_cause(rate: float, recent: Sequence[Mapping[str, float]], peak: float) -> str:
    if not recent:
        return "This is the first update, so the cause is the model or these records"
    norms = ", ".join(f"{row['grad_norm']:.3g}" for row in recent)
    losses = ", ".join(f"{row['loss']:.3g}" for row in recent)
    highest = max(row["lr"] for row in recent)
    return (
        f"The last updates had gradient norms {norms} and losses {losses} at learning rates "
        f"up to {highest:.3g} (now {rate:.3g}): the usual cause is a learning rate that is too "
        f"high, so try --lr {peak / 10:.3g}"
    )
