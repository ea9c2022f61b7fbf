"""Panels as a PNG, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logratio.data.analysis.panels import HistogramPanel, Panel, StackPanel
from logratio.data.analysis.svg import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(path: Path, title: str, caption: str, panels: Sequence[Panel]) -> None:
    """Write panels, two in a row, to a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    places = [[str(at), str(at + 1)] for at in range(0, len(panels), 2)]
    if len(panels) % 2:
        places[-1] = [str(len(panels) - 1)] * 2  # the last one is wide
    figure = Figure(figsize=(9, 3 * len(places) + 0.6), layout="constrained")
    figure.suptitle(f"{title}\n{caption}", fontsize=11)
    axes = figure.subplot_mosaic(places)  # type: ignore[arg-type]  # its lists are invariant
    for number, panel in enumerate(panels):
        if isinstance(panel, HistogramPanel):
            _histograms(axes[str(number)], panel)
        else:
            _stacks(axes[str(number)], panel)
    figure.savefig(path, dpi=150)


def _histograms(axes: "Axes", panel: HistogramPanel) -> None:
    """Draw bins as steps; what lies outside of them is told, not drawn."""
    has_key = len(panel.series) > 1
    notes = () if has_key else panel.notes
    axes.set_title("\n".join([panel.title, *notes]), fontsize=9, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    for number, series in enumerate(panel.series):
        bins = series.bins
        outside = f"{bins.below + bins.beyond:,} further out"
        label = f"{panel.notes[number]}\n{outside}" if has_key else outside
        axes.stairs(bins.counts, bins.edges, fill=True, alpha=0.5, color=series.colour, label=label)
    if panel.zero:
        axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
    axes.legend(fontsize=7, frameon=False, loc="upper right")


def _stacks(axes: "Axes", panel: StackPanel) -> None:
    names = [f"{stack.label}\n{stack.note}" for stack in panel.stacks]
    starts = [0] * len(panel.stacks)
    for number, (name, colour) in enumerate(panel.parts):
        counts = [stack.parts[number] for stack in panel.stacks]
        axes.barh(names, counts, left=starts, color=colour, label=name)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.xaxis.set_major_formatter(lambda value, _: short(round(value)))
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
