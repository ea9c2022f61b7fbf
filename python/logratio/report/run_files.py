"""The files that a run writes to its output folder, and how they are read while it runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logratio.errors import MissingInputError

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SAMPLES_FILE = "samples.jsonl"
SPEED_FILE = "speed.jsonl"
INFO_FILE = "run_info.json"
"""Written at the start of a run: its settings, data and versions."""
SETTINGS_FILE = "training.json"
"""Written with the trained model."""
DATA_REPORT_FILE = "data_report.json"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What is known of a run from its output folder.

    Attributes:
        folder: The output folder.
        metrics: The row of each update.
        evaluations: The row of each evaluation of held-out data.
        samples: Sampled completions, with the number of the update as `step`.
        speed: Speed and memory of each update.
        info: What was written at the start of the run; empty for runs of earlier versions.
        settings: What was written with the trained model; None: the run has not finished.
    """

    folder: Path
    metrics: Sequence[Row] = ()
    evaluations: Sequence[Row] = ()
    samples: Sequence[Row] = ()
    speed: Sequence[Row] = ()
    info: Row = field(default_factory=dict)
    settings: Row | None = None

    @property
    def has_finished(self) -> bool:
        """Whether the trained model is saved, and not only that of an earlier run."""
        return self.settings is not None and self.settings.get("steps") == self.last_step

    @property
    def last_step(self) -> int:
        """Number of updates done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run, which may be running, finished or dead.

    Args:
        folder: Its output folder.

    Raises:
        MissingInputError: The folder has no file of a run.
    """
    if not any((folder / name).exists() for name in (METRICS_FILE, INFO_FILE, SETTINGS_FILE)):
        raise MissingInputError(
            f"{folder} has no {METRICS_FILE}, {INFO_FILE} or {SETTINGS_FILE}: give the output "
            "folder of a run"
        )
    info = _object(folder / INFO_FILE) or {"data": _object(folder / DATA_REPORT_FILE)}
    return RunFiles(
        folder,
        _rows(folder / METRICS_FILE),
        _rows(folder / EVALUATIONS_FILE),
        _rows(folder / SAMPLES_FILE),
        _rows(folder / SPEED_FILE),
        info,
        _object(folder / SETTINGS_FILE),
    )


def _rows(path: Path) -> list[Row]:
    """Read the whole rows of a file; a last row may be incomplete, as it is being written."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = filter(None, map(_parsed, lines))
    return [row for row in found if isinstance(row.get("step"), int)]


def _object(path: Path) -> Row | None:
    try:
        return _parsed(path.read_text("utf-8", errors="replace"))
    except OSError:
        return None


def _parsed(text: str) -> Row | None:
    """Return a JSON object; None for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
