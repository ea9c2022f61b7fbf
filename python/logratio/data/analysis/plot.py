"""Panels as a PNG, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logratio.data.analysis.panels import HistogramPanel, Panel, StackPanel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(path: Path, title: str, caption: str, panels: Sequence[Panel]) -> None:
    """Write panels, two in a row, to a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(9, 3 * rows + 0.6), layout="constrained")
    figure.suptitle(f"{title}\n{caption}", fontsize=10)
    places = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(places, panels, strict=False):
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel(panel.x_label)
        if isinstance(panel, HistogramPanel):
            _histograms(axes, panel)
        else:
            _stacks(axes, panel)
    figure.savefig(path, dpi=150)


def _histograms(axes: "Axes", panel: HistogramPanel) -> None:
    """Draw bins as steps; what lies outside of them is told, not drawn."""
    axes.set_ylabel(panel.y_label)
    for number, series in enumerate(panel.series):
        bins = series.bins
        note = panel.notes[number] if len(panel.series) > 1 else "\n".join(panel.notes)
        outside = bins.below + bins.beyond
        note += f"\n{outside:,} outside" if outside else ""
        style = {"fill": True, "alpha": 0.5, "color": series.colour, "label": note}
        axes.stairs(bins.counts, bins.edges, **style)  # type: ignore[arg-type]
    if panel.zero:
        axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False)


def _stacks(axes: "Axes", panel: StackPanel) -> None:
    names = [f"{stack.label}\n{stack.note}" for stack in panel.stacks]
    starts = [0] * len(panel.stacks)
    for number, (name, colour) in enumerate(panel.parts):
        counts = [stack.parts[number] for stack in panel.stacks]
        axes.barh(names, counts, left=starts, color=colour, label=name)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
