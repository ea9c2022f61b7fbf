"""The results of a sweep: one durable row per run, the best run, and a picture."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logratio.data.analysis.evaluation_result import Evaluation
from logratio.durable import published, sync
from logratio.extras import MissingExtraError, require
from logratio.intervals import wilson
from logratio.picture_style import BLUE, GREEN, NO_DATE, ORANGE, SKY, STYLE
from logratio.progress import say
from logratio.training.config import TrainConfig
from logratio.training.validation import beta_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS_FILE, PICTURE_FILE = "sweep.jsonl", "sweep.svg"


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep.

    Attributes:
        name: Name of the run's folder in the folder of the sweep.
        loss, beta, lr, seed: The settings in which the runs differ.
        failed: Why the run failed; None if it was trained and evaluated.
        steps: Number of updates.
        seconds: Duration of training and evaluation in the process that finished them.
        evaluation: The fields of an `Evaluation`; None if the run failed.
        held_out: What the evaluation depends on besides the policy: the digest of the held-out
            data, and the settings of the sampling.
    """

    name: str
    loss: str
    beta: float
    lr: float
    seed: int
    failed: str | None = None
    steps: int = 0
    seconds: float = 0.0
    evaluation: Mapping[str, Any] | None = None
    held_out: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, run: TrainConfig, **results: Any) -> "SweepRow":
        """Return the row of a run."""
        name = Path(run.output).name
        return cls(name, run.loss, beta_of(run), run.lr, run.seed, **results)

    def __repr__(self) -> str:
        if self.failed:
            return f"SweepRow({self.name}, failed: {self.failed})"
        return f"SweepRow({self.name}, accuracy {self.accuracy:.3f}, KL {self.kl:.3g})"

    @property
    def accuracy(self) -> float:
        """Held-out accuracy; NaN if the run failed."""
        return float(self.evaluation["accuracy"]) if self.evaluation else math.nan

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `accuracy`, which is not empty at 0 and 1."""
        return wilson(self.accuracy, self.evaluation["pairs"]) if self.evaluation else (0.0, 1.0)

    @property
    def accuracy_error(self) -> float:
        """Standard error of `accuracy`: half the width of the interval, divided by 1.96."""
        low, high = self.accuracy_interval
        return (high - low) / (2 * 1.96)

    @property
    def kl(self) -> float:
        """KL divergence from the reference, in nats per completion; NaN if it was not estimated."""
        return self._kl("nats")

    @property
    def kl_error(self) -> float:
        """Standard error of `kl`."""
        return self._kl("standard_error")

    def _kl(self, name: str) -> float:
        found = (self.evaluation or {}).get("kl")
        return float(found[name]) if found else math.nan


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        output: Folder of the sweep.
        rows: One row per run, in the order of the runs.
        best: The chosen run; None if no run qualifies.
        reason: Why it was chosen, or why none was.
    """

    output: Path
    rows: list[SweepRow]
    best: SweepRow | None
    reason: str

    def __repr__(self) -> str:
        best = self.best.name if self.best else "none"
        return f"SweepResult({str(self.output)!r}, {len(self.rows)} runs, best {best})"

    @property
    def ranked(self) -> list[SweepRow]:
        """The rows by accuracy, the highest first; failed runs last."""
        return sorted(self.rows, key=lambda row: (bool(row.failed), -row.accuracy))


def evaluation_fields(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as it reads back from JSON: lists for tuples, None for NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    fields: dict[str, Any] = plain(evaluation.to_dict())
    return fields


def card_fields(row: SweepRow) -> dict[str, Any]:
    """Return the evaluation of a run with the names of `evaluations.jsonl`, for its model card."""
    found = row.evaluation or {}
    fields = {
        "step": row.steps,
        "groups": found["pairs"],
        "eval_rewards/accuracies": row.accuracy,
        "accuracy_interval": row.accuracy_interval,
        "eval_rewards/margins": found["margin"],
        "eval_expected_calibration_error": found["calibration"]["expected_error"],
    }
    if found["kl"]:
        fields |= {"eval_kl": row.kl, "kl": found["kl"]}
        fields["eval_sample_length"] = found["kl"]["mean_length"]
    return fields


def read_rows(path: Path) -> dict[str, SweepRow]:
    """Read the last row of each run; a line that was cut off by a crash is left out."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").split("\n")[:-1]
    rows = [SweepRow(**json.loads(line)) for line in lines]
    return {row.name: row for row in rows}


def append_row(path: Path, row: SweepRow) -> None:
    """Append a row, and return when it is on the disk."""
    is_new = not path.exists()
    with path.open("ab+") as file:
        _cut_torn_line(file)
        file.write((json.dumps(asdict(row)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def _cut_torn_line(file: Any) -> None:
    """Remove the end of a file after its last line break."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def choose(rows: Sequence[SweepRow], kl_budget: float | None) -> tuple[SweepRow | None, str]:
    """Choose the run with the highest held-out accuracy within a budget of KL divergence.

    Runs whose accuracy is less than one standard error below the highest are tied: of them, the one
    with the lowest KL is chosen.

    Args:
        rows: The runs.
        kl_budget: Largest KL divergence, in nats per completion; None: any.

    Returns:
        The chosen run, and the reason; None and the reason if no run qualifies.
    """
    finished = [row for row in rows if not row.failed]
    allowed = [row for row in finished if kl_budget is None or row.kl <= kl_budget]
    if not allowed:
        within = f" with a KL of at most {kl_budget:g} nats" if finished else ""
        return None, f"no run{within} has finished"
    top = max(allowed, key=lambda row: row.accuracy)
    tied = [row for row in allowed if row.accuracy >= top.accuracy - top.accuracy_error]
    best = min(tied, key=lambda row: (_or_infinity(row.kl), -row.accuracy))
    limit = "" if kl_budget is None else f" among runs with a KL of at most {kl_budget:g} nats"
    if len(tied) == 1:
        return best, f"the highest accuracy{limit}"
    how = "the lowest KL" if not math.isnan(best.kl) else "the highest accuracy, without a KL,"
    return (
        best,
        f"{how} of {len(tied)} runs within one standard error of the highest accuracy{limit}",
    )


def _or_infinity(value: float) -> float:
    return math.inf if math.isnan(value) else value


_COLOURS = (BLUE, ORANGE, GREEN, SKY)


def try_to_draw(result: SweepResult, kl_budget: float | None) -> Path | None:
    """Draw the picture; if that fails, print a note, because the results do not depend on it."""
    path = result.output / PICTURE_FILE
    try:
        draw(result, kl_budget, path)
    except MissingExtraError as error:
        say(f"no picture was drawn: {error}")
    except Exception as error:  # whatever matplotlib raises
        say(f"no picture was drawn: {type(error).__name__}: {error}")
    else:
        return path
    return None


def draw(result: SweepResult, kl_budget: float | None, path: Path) -> None:
    """Draw held-out accuracy over KL, with 95 % intervals, one colour per loss.

    Args:
        result: The result of a sweep.
        kl_budget: The budget, drawn as a line; None: no line.
        path: An SVG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "plots")
    from matplotlib import style
    from matplotlib.figure import Figure

    shown = [row for row in result.rows if not row.failed and not math.isnan(row.kl)]
    with style.context(STYLE), published(path) as partial_file:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for colour, loss in zip(_COLOURS, dict.fromkeys(row.loss for row in shown), strict=False):
            _draw_loss(axes, [row for row in shown if row.loss == loss], colour)
        if result.best in shown and result.best is not None:
            at = (result.best.kl, result.best.accuracy)
            axes.plot(*at, "o", ms=14, mfc="none", mec="black", label="chosen")
        if kl_budget is not None:
            axes.axvline(kl_budget, color="black", ls="--", lw=0.8, label="KL budget")
        axes.set(xlabel="KL to the reference, nats per completion", ylabel="held-out accuracy")
        axes.set_title(f"{len(shown)} runs, 95 % intervals")
        if shown:
            axes.legend()
        figure.savefig(partial_file, format="svg", metadata=NO_DATE[".svg"])


def _draw_loss(axes: "Axes", rows: list[SweepRow], colour: str) -> None:
    """Draw the runs of one loss, each with its settings."""
    axes.errorbar(
        [row.kl for row in rows],
        [row.accuracy for row in rows],
        xerr=[1.96 * row.kl_error if row.kl_error == row.kl_error else 0 for row in rows],
        yerr=list(zip(*map(_distances, rows), strict=True)),
        fmt="o",
        color=colour,
        label=rows[0].loss,
        capsize=2,
    )
    for row in rows:
        text = f"β {row.beta:g}, lr {row.lr:g}, seed {row.seed}"
        place = (row.kl, row.accuracy)
        axes.annotate(text, place, (4, 4), textcoords="offset points", fontsize=6)


def _distances(row: SweepRow) -> tuple[float, float]:
    """Return the distances of the ends of the interval from the accuracy."""
    low, high = row.accuracy_interval
    return row.accuracy - low, high - row.accuracy
