"""Pictures of a run by matplotlib, as SVG: curves over the updates, and distributions.

matplotlib is optional, and is imported only to draw.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from logratio.intervals import around
from logratio.picture_style import BLUE, GREEN, GREY, ORANGE, STYLE
from logratio.report.run_files import Row, RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Panel = Callable[[Axes], None]

POINTS = 300
"""Points of a curve; further updates are averaged."""
COLUMNS = 3
_COLOURS = {"chosen": BLUE, "rejected": ORANGE}


@dataclass(frozen=True)
class Curves:
    """A panel of curves.

    Attributes:
        title: What is shown, with its unit.
        training: Metrics of the updates, drawn as lines; those of the held-out data under the same
            name are drawn as points.
        held_out: Further metrics of the evaluations.
        start: A value to draw as a dashed line, or None.
        from_zero: Whether the axis begins at 0.
    """

    title: str
    training: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    start: float | None = None
    from_zero: bool = False


PANELS = (
    Curves("Loss", ("loss",)),
    Curves("Preference accuracy", ("rewards/accuracies",), start=0.5),
    Curves("Reward margin", ("rewards/margins",), start=0.0),
    Curves("Rewards", ("rewards/chosen", "rewards/rejected"), start=0.0),
    Curves(
        "Change of log-probs, nats per completion",
        ("logratios/chosen", "logratios/rejected"),
        start=0.0,
    ),
    Curves("Log-probs, nats per completion", ("logps/chosen", "logps/rejected")),
    Curves("Mean gradient weight σ(−margin)", ("gradient_weight",), start=0.5),
    Curves("KL from the reference, nats", held_out=("eval_kl",), start=0.0),
    Curves(
        "Length of samples, tokens", held_out=("eval_sample_length", "eval_reference_sample_length")
    ),
    Curves("Length of the pairs, tokens", ("lengths/chosen", "lengths/rejected")),
    Curves("Calibration error", held_out=("eval_expected_calibration_error",)),
    Curves("Gradient norm", ("grad_norm",)),
    Curves("Load-balancing loss of the router", ("aux_loss",)),
    Curves("Learning rate", ("lr",)),
    Curves("Tokens per second", ("speed/tokens_per_second",), from_zero=True),
    Curves("MFU", ("speed/mfu",), from_zero=True),
    Curves("Peak memory, GB", ("memory/peak_gb",), from_zero=True),
)


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_curves(run: RunFiles) -> bytes | None:
    """Draw the metrics over the updates as SVG; None if there is nothing to draw."""
    rows = [*run.metrics, *run.speed]
    panels: list[Panel] = []
    for one in PANELS:
        held = [*(f"eval_{name}" for name in one.training), *one.held_out]
        shown = {name: _series(rows, name) for name in one.training}
        shown |= {name: _series(run.evaluations, name) for name in held}
        if shown := {name: series for name, series in shown.items() if len(series)}:
            panels.append(partial(_draw_curves, curves=one, shown=shown, run=run))
    return _svg(panels)


def draw_distributions(evaluation: Row) -> bytes | None:
    """Draw the histograms of an evaluation as SVG; None if it has none."""
    found = evaluation.get("distributions")
    if not isinstance(found, Mapping):
        return None
    titles = {
        "rewards": "Rewards of held-out pairs",
        "margins": "Reward margins",
        "gradient_weights": "Gradient weights σ(−margin)",
    }
    panels: list[Panel] = [
        partial(_draw_histogram, title=title, histogram=found[name])
        for name, title in titles.items()
    ]
    panels.append(partial(_draw_calibration, bins=found["calibration"]))
    return _svg(panels, columns=2)


def _series(rows: Iterable[Row], name: str) -> np.ndarray:
    """Return update and value of the rows that have a metric, float64 `[n, 2]`."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return np.array(found, dtype=np.float64).reshape(-1, 2)


def averaged(series: np.ndarray) -> np.ndarray:
    """Average neighbours until at most `POINTS` points are left."""
    if len(series) <= POINTS:
        return series
    return np.array([part.mean(0) for part in np.array_split(series, POINTS)])


def _draw_curves(
    axes: "Axes", curves: Curves, shown: Mapping[str, np.ndarray], run: RunFiles
) -> None:
    """Draw lines for the updates and points for the evaluations."""
    if curves.start is not None:
        axes.axhline(curves.start, color=GREY, linestyle="--", linewidth=0.8)
    for name, series in shown.items():
        colour = _colour(name)
        x, y = averaged(series).T
        if name in curves.training:
            axes.plot(x, y, color=colour, linewidth=1.0, label=_label(name))
        else:
            axes.plot(x, y, "o--", color=colour, markersize=4, linewidth=0.8, label=_label(name))
    _draw_intervals(axes, shown, run.evaluations)
    axes.set_title(curves.title, loc="left", fontweight="bold")
    axes.set_xlabel("update")
    if curves.from_zero:
        axes.set_ylim(bottom=0)
    if len(shown) > 1:
        axes.legend(frameon=False)


def _draw_intervals(
    axes: "Axes", shown: Mapping[str, np.ndarray], evaluations: Sequence[Row]
) -> None:
    """Draw the 95 % intervals of the accuracy and of the KL."""
    bars = []
    for row in evaluations:
        if "eval_rewards/accuracies" in shown and row.get("accuracy_interval"):
            bars.append((row["step"], *row["accuracy_interval"]))
        if "eval_kl" in shown and row.get("kl"):
            variance = row["kl"]["standard_error"] ** 2
            bars.append((row["step"], *around(row["eval_kl"], variance)))
    for step, low, high in bars:
        axes.plot([step, step], [low, high], color=GREEN, linewidth=0.8)


def _colour(name: str) -> str:
    if name == "eval_reference_sample_length":
        return ORANGE
    side = name.rpartition("/")[2]
    return _COLOURS.get(side, GREEN if name.startswith("eval_") else BLUE)


def _label(name: str) -> str:
    side = name.rpartition("/")[2]
    words = side if side in _COLOURS else "training"
    if name.endswith("sample_length"):
        return "reference" if "reference" in name else "policy"
    if name.startswith("eval_"):
        return f"{side}, held-out" if side in _COLOURS else "held-out"
    return words


def _draw_histogram(axes: "Axes", title: str, histogram: Mapping[str, Any]) -> None:
    counts, (low, high) = histogram["counts"], histogram["ends"]
    for name, heights in counts.items():
        edges = np.linspace(low, high, len(heights) + 1)
        colour = _COLOURS.get(name, GREEN)
        axes.stairs(
            heights, edges, fill=True, alpha=0.5 if len(counts) > 1 else 0.85, color=colour,
            label=name,
        )  # fmt: skip
    if low < 0 < high:
        axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_ylabel("pairs")
    if len(counts) > 1:
        axes.legend(frameon=False)


def _draw_calibration(axes: "Axes", bins: Sequence[tuple[int, float, float]]) -> None:
    """Draw the share of correct pairs over the confidence, with areas in proportion to pairs."""
    counts, confidence, correct = np.array(bins, dtype=np.float64).T
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=0.8)
    axes.scatter(confidence, correct, s=8 + 200 * counts / counts.sum(), color=GREEN, alpha=0.85)
    axes.set_title("Calibration", loc="left", fontweight="bold")
    axes.set_xlabel("confidence σ(|margin|)")
    axes.set_ylabel("share correct")


def _svg(panels: "Sequence[Panel]", columns: int = COLUMNS) -> bytes | None:
    """Draw panels in rows of `columns`."""
    if not panels:
        return None
    from matplotlib import style
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with style.context(STYLE):
        drawn = Figure(figsize=(12, 2.6 * rows), layout="constrained")
        for number, panel in enumerate(panels, 1):
            axes = drawn.add_subplot(rows, columns, number)
            axes.spines[["top", "right"]].set_visible(False)
            panel(axes)
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
