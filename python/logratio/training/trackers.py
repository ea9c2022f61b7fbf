"""Experiment trackers: the metrics of a run to wandb, mlflow and trackio, by their own packages.

Each tracker has a daemon thread and a bounded queue. The run only puts rows into the queue: it
never waits for a dashboard, and a tracker that fails or blocks costs its own rows and no other.
"""

import importlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Lock, Thread
from typing import Annotated, Any, Protocol, TypeAlias

from logratio.durable import write_atomic
from logratio.errors import ConfigError, SettingTypeError
from logratio.progress import say
from logratio.synonyms import nearest
from logratio.validation import Converted, split_list

IDS_FILE = "trackers.json"
PROJECT = "logratio"
"""Name of the project if none is given."""
ROWS = 1_000
"""Rows that may wait for a tracker; further ones are dropped."""
PATIENCE = 10.0
"""Seconds that the end of a run waits for its trackers, all of them together."""


def as_names(given: Any) -> tuple[str, ...] | None:
    """Return one name or several as a tuple; None stays None.

    Raises:
        SettingTypeError: The value is neither a string nor a list of strings.
    """
    if given is None:
        return None
    names = split_list(given) if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
        raise SettingTypeError(f"give the names of trackers, not {given!r}")
    return tuple(names)


ReportTo: TypeAlias = Annotated[str | Sequence[str] | None, Converted(as_names)]
"""One tracker, or several."""


def trackers_of(report_to: ReportTo) -> tuple[str, ...]:
    """Return the trackers that the setting `report_to` names.

    Args:
        report_to: None: "tensorboard". "none": no tracker. "all": every one that is installed.

    Raises:
        ConfigError: A tracker is unknown, or its package is not installed.
    """
    names = as_names(report_to)
    if names is None:
        return ("tensorboard",)
    if names in (("none",), ()):
        return ()
    if names == ("all",):
        return ("tensorboard", *filter(_is_installed, _TRACKERS))
    for name in names:
        if name not in KNOWN:
            raise ConfigError(f"--report-to {name}: {_refusal(name, names)}")
        if name in _TRACKERS and not _is_installed(name):
            raise ConfigError(f"--report-to {name}: its package is missing: pip install {name}")
    return tuple(dict.fromkeys(names))


def _refusal(name: str, names: Sequence[str]) -> str:
    """Return what to do instead of giving a name that is no tracker."""
    if name in ("none", "all"):
        others = ", ".join(one for one in names if one != name)
        meaning = "no tracker" if name == "none" else "every tracker that is installed"
        return f"it means {meaning}: give {name} alone, or only {others}"
    known = f"choose from {', '.join(KNOWN)}, or give none or all alone"
    if name in _ELSEWHERE:
        return f"this tracker is not supported: {known}; a callback can send the metrics there"
    near = nearest(name, (*KNOWN, "none", "all"))
    return f"unknown tracker: {f'did you mean {near}? Otherwise ' if near else ''}{known}"


_ELSEWHERE = {
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "neptune"),
    *("swanlab",),
}
"""Trackers that transformers has in addition."""


def _is_installed(name: str) -> bool:
    """Return whether a package is installed; a folder of that name without code is none."""
    if name in sys.modules:
        return sys.modules[name] is not None
    found = find_spec(name)
    return found is not None and found.origin is not None


def dashboard_names(values: Mapping[str, float]) -> dict[str, float]:
    """Rename metrics as transformers does for dashboards: "train/loss", "eval/loss"."""
    renamed = {}
    for name, value in values.items():
        if name.startswith("eval_"):
            name = "eval/" + name.removeprefix("eval_")
        elif not name.startswith(("speed/", "memory/")):
            name = "train/" + _TRANSFORMERS.get(name, name)
        renamed[name] = value
    return renamed


_TRANSFORMERS = {"lr": "learning_rate"}
"""Metrics that transformers names differently."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker records of a run at its start.

    Attributes:
        name: Name of the run.
        project: Its project, or experiment; None: the tracker's own setting, or `PROJECT`.
        settings: Its settings, as JSON has them.
        continued: The tracker's id of the run that this one resumes, or None.
    """

    name: str
    project: str | None
    settings: Mapping[str, Any]
    continued: str | None = None


SAMPLES = "eval/samples"
"""Name of the table of samples in a tracker."""


def sample_table(samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the rows of a table of samples.

    Args:
        samples: Rows of `samples.jsonl`; without a reference, there is no column for it.
    """
    names = ["prompt", "policy", "reference"]
    if samples and samples[0].get("reference") is None:
        names.remove("reference")
    return names, [[str(row[name]) for name in names] for row in samples]


class Tracker(Protocol):
    """A client of a tracker. All methods run in one thread, and may block or raise anything."""

    def start(self, run: TrackedRun) -> str:
        """Start or continue a run; return its id."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of an update or of an evaluation."""
        ...

    def log_table(self, step: int, names: list[str], rows: list[list[str]]) -> None:
        """Record the samples of an evaluation as a table."""
        ...

    def finish(self, *, failed: bool) -> None:
        """End the run, and send what has not been sent."""
        ...


class _Wandb:
    """A run of Weights & Biases; if the process has one already, that run."""

    def start(self, run: TrackedRun) -> str:
        wandb: Any = importlib.import_module("wandb")
        self._is_own = wandb.run is None
        if self._is_own:
            known = {"id": run.continued, "resume": "allow"} if run.continued else {}
            project = run.project or os.environ.get("WANDB_PROJECT", PROJECT)
            self._run = wandb.init(project=project, name=run.name, config=run.settings, **known)
        else:
            self._run = wandb.run
            self._run.config.update(run.settings, allow_val_change=True)
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)
        return str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**dashboard_names(values), "train/global_step": step})

    def log_table(self, step: int, names: list[str], rows: list[list[str]]) -> None:
        table = importlib.import_module("wandb").Table(columns=names, data=rows)
        self._run.log({SAMPLES: table, "train/global_step": step})

    def finish(self, *, failed: bool) -> None:
        if self._is_own:
            self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run of trackio, which identifies a run by its name within a project."""

    def start(self, run: TrackedRun) -> str:
        self._trackio: Any = importlib.import_module("trackio")
        name = run.continued or f"{run.name}-{secrets.token_hex(3)}"
        self._run = self._trackio.init(
            project=run.project or PROJECT, name=name, config=dict(run.settings), resume="allow"
        )
        return name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**dashboard_names(values), "train/global_step": step}, step=step)

    def log_table(self, step: int, names: list[str], rows: list[list[str]]) -> None:
        pandas: Any = importlib.import_module("pandas")  # a dependency of trackio
        table = self._trackio.Table(dataframe=pandas.DataFrame(rows, columns=names))
        self._run.log({SAMPLES: table, "train/global_step": step}, step=step)

    def finish(self, *, failed: bool) -> None:
        self._run.finish()


class _Mlflow:
    """A run of MLflow; if the process has started one already, that run.

    Metrics keep the names without folders that transformers sends to MLflow: "loss", "eval_loss".
    """

    LONGEST, AT_ONCE = 250, 100
    """Characters of a parameter, and parameters of a request, that every server accepts."""

    def __init__(self) -> None:
        # MLflow's active run belongs to a thread, so it is asked for in the caller's.
        mlflow: Any = sys.modules.get("mlflow")
        active = mlflow.active_run() if mlflow else None
        self._given = active.info.run_id if active else None

    def start(self, run: TrackedRun) -> str:
        self._mlflow: Any = importlib.import_module("mlflow")
        if run.project:
            self._mlflow.set_experiment(run.project)
        known = self._given or run.continued
        named = {"run_id": known} if known else {"run_name": run.name}
        started = self._mlflow.start_run(**named)
        if not run.continued:  # a parameter cannot be changed later
            rows = [(name, str(value)[: self.LONGEST]) for name, value in flat(run.settings)]
            for at in range(0, len(rows), self.AT_ONCE):
                self._mlflow.log_params(dict(rows[at : at + self.AT_ONCE]))
        return str(started.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        named = {_TRANSFORMERS.get(name, name): value for name, value in values.items()}
        self._mlflow.log_metrics(named, step=step)

    def log_table(self, step: int, names: list[str], rows: list[list[str]]) -> None:
        """Append to the table of the run, which has the updates of all evaluations."""
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        self._mlflow.log_table({"step": [step] * len(rows), **columns}, "samples.json")

    def finish(self, *, failed: bool) -> None:
        if not self._given:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


_TRACKERS: Mapping[str, type[Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
KNOWN = ("tensorboard", *_TRACKERS)
"""Names of trackers."""


def flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return settings without nesting: ("rules.max_length", 1024)."""
    rows: list[tuple[str, Any]] = []
    for name, value in settings.items():
        rows += flat(value, f"{before}{name}.") if isinstance(value, Mapping) else [
            (before + name, value)
        ]  # fmt: skip
    return rows


def plain_settings(config: Any) -> dict[str, Any]:
    """Return a config as JSON has it; tables among its inputs are named by their type only."""
    plain: dict[str, Any] = json.loads(json.dumps(_fields(config), default=_plain))
    return plain


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return _fields(value)
    return str(value) if isinstance(value, Path) else f"a {type(value).__name__}"


class RunIds:
    """The trackers' ids of a run, in a file of its output folder.

    Args:
        output: The output folder.
        resume: Keep the ids that the file has; otherwise it is written anew.
    """

    def __init__(self, output: Path, *, resume: bool) -> None:
        self._path, self._lock = output / IDS_FILE, Lock()
        self._ids: dict[str, str] = {}
        with suppress(OSError, ValueError):
            found = json.loads(self._path.read_text("utf-8")) if resume else {}
            self._ids = {name: one for name, one in found.items() if isinstance(one, str)}

    def __getitem__(self, name: str) -> str | None:
        return self._ids.get(name)

    def record(self, name: str, run_id: str) -> None:
        """Record an id. If it cannot be written, a resumed run starts a new one there."""
        with self._lock, suppress(OSError):
            self._ids[name] = run_id
            write_atomic(self._path, json.dumps(self._ids) + "\n")


_Row: TypeAlias = tuple[int, Mapping[str, float], Sequence[Mapping[str, Any]]]
"""The number of updates done, metrics, and samples."""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class Reporter:
    """Sends rows to one tracker from a daemon thread.

    Args:
        name: Name of the tracker.
        run: What to record of the run; `continued` is taken from `ids`.
        ids: Ids of the run, where a new one is recorded.

    Attributes:
        dropped: Number of rows that were dropped because the queue was full.
    """

    def __init__(self, name: str, run: TrackedRun, ids: RunIds) -> None:
        self.name, self.dropped = name, 0
        self._ids, self._failed = ids, False
        self._tracker = _TRACKERS[name]()
        self._run = TrackedRun(run.name, run.project, run.settings, ids[name])
        self._queue: Queue[_Row | None] = Queue(ROWS)
        self._is_broken, self._takes_tables = False, True
        self._thread = Thread(target=self._work, name=f"logratio-{name}", daemon=True)
        self._thread.start()

    def send(
        self, step: int, values: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Send the metrics of an update or of an evaluation; returns at once.

        Args:
            step: Number of updates done.
            values: The metrics.
            samples: Rows of `samples.jsonl`, which are sent as a table.
        """
        if self._is_broken:
            return
        try:
            self._queue.put_nowait((step, values, samples))
        except Full:
            self.dropped += 1
            if self.dropped == 1:
                say(
                    f"{self.name} does not keep up: rows are dropped there; metrics.jsonl has all "
                    "of them, and the run continues"
                )

    def _work(self) -> None:
        """Start the tracker's run, send what is in the queue, and end it."""
        try:
            self._ids.record(self.name, self._tracker.start(self._run))
            while row := self._queue.get():
                step, values, samples = row
                self._tracker.log(step, values)
                if samples and self._takes_tables:
                    self._send_table(step, samples)
            self._tracker.finish(failed=self._failed)
        except BaseException as error:  # some trackers raise SystemExit
            self._is_broken = True
            say(
                f"{self.name} failed ({_reason(error)}); the run continues, metrics.jsonl has all "
                "metrics"
            )

    def _send_table(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Send samples as a table; if the tracker refuses it, send metrics only from then on."""
        try:
            self._tracker.log_table(step, *sample_table(samples))
        except Exception as error:
            self._takes_tables = False
            say(f"{self.name} gets no samples ({_reason(error)}); samples.jsonl has all of them")

    def close(self, deadline: float, *, failed: bool) -> None:
        """Wait until all is sent, but not beyond `deadline`, a value of `time.monotonic`."""
        self._failed = failed
        with suppress(Full):
            self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            say(
                f"{self.name} did not answer within {PATIENCE:g} s and misses up to "
                f"{self._queue.qsize() + self.dropped:,} rows; metrics.jsonl has all of them"
            )
        elif self.dropped:
            say(f"{self.name} misses {self.dropped:,} rows; metrics.jsonl has all of them")


def close_all(reporters: Sequence[Reporter], *, failed: bool) -> None:
    """Close reporters, within `PATIENCE` in all.

    Args:
        reporters: The reporters of a run.
        failed: Whether an exception ended the run.
    """
    deadline = time.monotonic() + PATIENCE
    for one in reporters:
        one.close(deadline, failed=failed)


def reporters_of(config: Any, settings: Mapping[str, Any]) -> list[Reporter]:
    """Start the reporters that the settings of a run name; TensorBoard's events are not among them.

    Args:
        config: A `TrainConfig`.
        settings: The settings to record, as JSON has them.
    """
    output = Path(config.output)
    names = [name for name in trackers_of(config.report_to) if name in _TRACKERS]
    if not names:
        return []
    ids = RunIds(output, resume=config.resume)
    run = TrackedRun(config.run_name or output.resolve().name, config.project, settings)
    return [Reporter(name, run, ids) for name in names]
