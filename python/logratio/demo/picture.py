"""The demo as a picture: training curves and the tables."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logratio.demo.run import DemoResult
from logratio.demo.tables import best_of_rows, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("loss", "DPO loss"),
    ("rewards/accuracies", "accuracy in training"),
    ("rewards/margins", "reward margin"),
)


def draw_picture(folder: Path, result: DemoResult) -> Path:
    """Write `demo.png`: three training curves and the two tables; return its path."""
    from matplotlib.figure import Figure

    lines = (folder / "dpo" / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplot_mosaic([["0", "1", "2"], ["models", "models", "best"]])
    for place, (name, title) in enumerate(CURVES):
        _curve(axes[str(place)], history, name, title)
    _table(axes["models"], ("", "SFT model", "DPO policy"), rows(result))
    _table(axes["best"], ("", "reward", "random", "oracle"), best_of_rows(result))
    path = folder / "demo.png"
    figure.savefig(path, dpi=110)
    return path


def _curve(axes: "Axes", history: list[dict[str, Any]], name: str, title: str) -> None:
    axes.plot([row["step"] for row in history], [row[name] for row in history], linewidth=1)
    axes.set_title(title)
    axes.set_xlabel("update")
    axes.grid(alpha=0.3)


def _table(axes: "Axes", head: tuple[str, ...], body: list[Any]) -> None:
    axes.axis("off")
    table = axes.table(cellText=body, colLabels=head, loc="center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.7)
