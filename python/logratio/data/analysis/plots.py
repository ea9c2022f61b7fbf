"""Draw the data report with matplotlib: lengths, their difference, and the tokens computed.

matplotlib is an optional dependency and is imported only to draw.
"""

from collections.abc import Callable, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logratio.data.analysis.pairs import LengthBias
from logratio.data.analysis.report import Analysis
from logratio.data.analysis.statistics import Distribution, Histogram, binned, histogram, written
from logratio.data.analysis.token_use import BATCH, Padding
from logratio.durable import published
from logratio.errors import ConfigError
from logratio.extras import require
from logratio.forecast import count
from logratio.picture_style import BLUE, GREEN, GREY, NO_DATE, ORANGE, SKY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Panel = Callable[[Axes], None]

SUFFIXES = (".svg", ".png", ".pdf")
"""Supported file types."""

_COLOURS = {"chosen": BLUE, "rejected": ORANGE, "completion": BLUE, "prompt": GREY, "group": GREY}

_BINS = 40
_STEPS = [1, 2, 5, 10]  # of ticks, times a power of ten
_GAP = 2  # bins between the histogram and the bar of the numbers outside it


def check_picture(path: Path) -> None:
    """Check that a picture can be drawn, before the data is read.

    Raises:
        ConfigError: The suffix is not one of `SUFFIXES`.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a picture is {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    require("matplotlib", "plots")


def draw(analysis: Analysis, path: Path) -> None:
    """Write the picture. The same data and matplotlib version give the same bytes.

    Args:
        analysis: The analysis of at least one group.
        path: The file; its suffix, one of `SUFFIXES`, is the file type.

    Raises:
        ConfigError: The suffix is not supported, or there is no group.
        MissingExtraError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    check_picture(path)
    from matplotlib import style

    metadata = {"Title": _title(analysis), **NO_DATE[path.suffix]}
    drawn = figure(analysis)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style.context(STYLE), published(path) as partial_file:
        drawn.savefig(partial_file, format=path.suffix[1:], dpi=150, metadata=metadata)


def figure(analysis: Analysis) -> "Figure":
    """Return the picture as a figure: histograms, two per row, with the tokens computed below.

    Raises:
        ConfigError: There is no group to draw.
    """
    if analysis.padding is None:
        raise ConfigError("there is no group to draw")
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    computed = partial(_draw_computed, found=analysis.padding)
    panels: list[Panel] = [*_histograms(analysis), computed]
    last = len(panels) - 1
    # A panel without a neighbour fills its row.
    places = [[at, min(at + 1, last - 1)] for at in range(0, last, 2)] + [[last, last]]
    with style.context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        drawn = Figure(figsize=(10, 3 * len(places) + 0.7), layout=layout)
        drawn.suptitle(f"{_title(analysis)}\n{_caption(analysis)}", fontsize=11)
        axes: Mapping[int, Axes] = drawn.subplot_mosaic(places)  # type: ignore[arg-type]
        for number, panel in enumerate(panels):
            panel(axes[number])
    return drawn


def _title(analysis: Analysis) -> str:
    return f"{analysis.groups:,} preference {'pairs' if analysis.are_pairs else 'groups'}"


def _caption(analysis: Analysis) -> str:
    account = analysis.account
    return (
        f"{count(account.read, 'row')} read = {account.kept:,} kept + "
        f"{account.refused:,} refused + {count(account.deduplicated, 'duplicate')} left out"
    )


def _histograms(analysis: Analysis) -> "list[Panel]":
    lengths, bias = analysis.lengths, analysis.bias

    def of(title: str, counted: str, *names: str) -> "Panel":
        named = {name: lengths[name] for name in names}
        return partial(_draw_lengths, title=title, counted=counted, lengths=named)

    shown = [
        of("Prompt", "groups", "prompt"),
        of("Completion", "completions", "completion")
        if bias is None
        else of("Chosen and rejected", "completions", "chosen", "rejected"),
        of("Group: prompt once, all completions", "groups", "group"),
    ]
    if bias is not None and bias.difference is not None:
        shown.append(partial(_draw_difference, bias=bias, difference=bias.difference))
    return shown


def _draw_lengths(
    axes: "Axes", title: str, counted: str, lengths: Mapping[str, Distribution]
) -> None:
    """Draw one or two distributions over the same bins."""
    bins = histogram(reduce(Distribution.joined, lengths.values()), _BINS)
    opacity = 0.85 if len(lengths) == 1 else 0.5
    shown = {
        name: binned(numbers, bins.start, bins.width, len(bins.counts))
        for name, numbers in lengths.items()
    }
    for name, numbers in lengths.items():
        label = f"{name}: median {numbers.median:,.1f}, mean {numbers.mean:,.1f}"
        _draw_bins(axes, shown[name], label, color=_COLOURS[name], alpha=opacity)
    _name_ends(axes, *shown.values())
    _name_axes(axes, "tokens", counted)
    _head(axes, title)


def _draw_difference(axes: "Axes", bias: LengthBias, difference: Distribution) -> None:
    """Draw chosen − rejected with both effect sizes and their intervals."""
    low, high = (written(end, 2) for end in bias.effect_interval)
    least, most = bias.superiority_interval
    effect = (
        f"Cohen's d_z = {written(bias.effect, 2)} (95 %: {low} … {high})"
        if bias.varies
        else "Cohen's d_z is not defined: the lengths do not vary"
    )
    longer = f"P(chosen longer) = {bias.superiority:.3f} (95 %: {least:.3f} … {most:.3f})"
    bins = histogram(difference, _BINS)
    _draw_bins(axes, bins, f"{effect}\n{longer}", color=GREEN, alpha=0.85)
    axes.axvline(0, color="black", linestyle="--", linewidth=0.8)
    _name_ends(axes, bins)
    _name_axes(axes, "tokens", "pairs")
    _head(axes, "Chosen − rejected, pair by pair")


def _draw_bins(axes: "Axes", bins: Histogram, label: str, **look: Any) -> None:
    """Draw the bins, and one bar at each end for the numbers outside them."""
    counts, edges = list(bins.counts), bins.edges
    if bins.below:
        last = bins.start - _GAP * bins.width
        counts, edges = [bins.below, 0, *counts], [last - bins.width, last, *edges]
    if bins.beyond:
        first = bins.end + _GAP * bins.width
        counts, edges = [*counts, 0, bins.beyond], [*edges, first, first + bins.width]
    axes.stairs(counts, edges, fill=True, label=label, **look)


def _name_ends(axes: "Axes", *shown: Histogram) -> None:
    """Label the bars at both ends with the numbers that they count."""
    start, end, away = shown[0].start, shown[0].end, (_GAP + 0.5) * shown[0].width
    look: dict[str, Any] = {"ha": "center", "rotation": 90, "fontsize": 7}
    for number, place, name in (
        (max(bins.below for bins in shown), start - away, f"< {start:,}".replace("-", "−")),
        (max(bins.beyond for bins in shown), end + away, f"≥ {end:,}"),
    ):
        if number:
            axes.annotate(name, (place, number), (0, 2), textcoords="offset points", **look)


def _draw_computed(axes: "Axes", found: Padding) -> None:
    """Draw the tokens that each layout computes as a stacked bar."""
    answers = found.rows - found.prompts
    once = found.shared - answers
    again = found.prompts - once

    names = ("padded,\nfile order", "padded,\nby length", "prompt shared")
    padding = (found.in_order - found.rows, found.in_length_order - found.rows, 0)
    parts = {
        "prompt once": (SKY, (once, once, once)),
        "completions": (BLUE, (answers, answers, answers)),
        "prompt again": (ORANGE, (again, again, 0)),
        "padding": (GREY, padding),
    }
    ends = np.zeros(len(names), np.int64)
    for part, (colour, tokens) in parts.items():
        bars = axes.barh(names, tokens, left=ends, color=colour, alpha=0.85, label=part)
        ends += tokens
    notes = (
        f"{100 * found.waste:.1f} % padding",
        f"{100 * found.sorted_waste:.1f} % padding",
        f"{100 * found.saved:.1f} % less than unpadded rows",
    )
    totals = [f"{end:,} tokens\n{note}" for end, note in zip(ends, notes, strict=True)]
    axes.bar_label(bars, totals, padding=4)
    axes.margins(x=0.2)  # room for the totals
    axes.invert_yaxis()
    _name_axes(axes, "tokens")
    _head(axes, f"Tokens computed, batches of {BATCH} groups", columns=len(parts))


def _name_axes(axes: "Axes", x_label: str, y_label: str | None = None) -> None:
    """Label the axes, with ticks at whole numbers: 200, 20 k, 3 M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=_STEPS, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter())
    if y_label is not None:
        axes.set_ylabel(y_label)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True))
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.grid(axis="y", color="#dddddd")
        axes.set_axisbelow(True)


def _head(axes: "Axes", title: str, columns: int = 1) -> None:
    """Place the title and the legend above the panel, where they cover no bar."""
    axes.legend(
        title=title,
        title_fontproperties={"weight": "bold", "size": 10},
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderpad=0,
        handlelength=1.2,
        ncols=columns,
        frameon=False,
    )
