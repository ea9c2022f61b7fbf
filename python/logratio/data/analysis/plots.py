"""The data report as a picture, by matplotlib."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from logratio.data.analysis.length_bias import LengthBias
from logratio.data.analysis.statistics import Distribution, Histogram, binned, histogram, written
from logratio.data.analysis.token_use import BATCH, Padding

if TYPE_CHECKING:
    from logratio.data.analysis.report import Analysis
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logratio.data.analysis.svg import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
from typing import TYPE_CHECKING

from logratio.data.analysis.svg import svg
from logratio.errors import ConfigError

if TYPE_CHECKING:
    from logratio.data.analysis.report import Analysis

BLUE, ORANGE, GREEN, GREY, SKY = "#0072b2", "#d55e00", "#009e73", "#999999", "#56b4e9"
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""

_BINS = 40


@dataclass(frozen=True, slots=True)
class Series:
    """One histogram of a panel."""

    label: str
    colour: str
    bins: Histogram


@dataclass(frozen=True, slots=True)
class HistogramPanel:
    """Histograms over one axis.

    Attributes:
        title: What is counted.
        x_label: With its unit.
        y_label: What there is one count for.
        series: One or two, over the same bins.
        notes: Lines of numbers that stand in the panel.
        zero: Whether to mark 0.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()
    zero: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """One bar of parts, end to end."""

    label: str
    parts: tuple[int, ...]
    note: str


@dataclass(frozen=True, slots=True)
class StackPanel:
    """Bars of parts.

    Attributes:
        title: What is counted.
        x_label: With its unit.
        parts: Name and colour of each part.
        stacks: The bars, from above.
    """

    title: str
    x_label: str
    parts: tuple[tuple[str, str], ...]
    stacks: tuple[Stack, ...]


Panel = HistogramPanel | StackPanel


def panels(analysis: "Analysis") -> list[Panel]:
    """Choose the panels: lengths, their difference, what is computed."""
    lengths = analysis.lengths
    shown: list[Panel] = [
        _lengths("Prompt", "groups", (("prompt", GREY, lengths["prompt"]),)),
        _answers(analysis),
        _lengths(
            "Group: prompt once, all completions", "groups", (("group", GREY, lengths["group"]),)
        ),
    ]
    if analysis.bias is not None and analysis.bias.difference is not None:
        shown.append(_difference(analysis.bias, analysis.bias.difference))
    if analysis.padding is not None:
        shown.append(_computing(analysis.padding))
    return shown


def caption(analysis: "Analysis") -> str:
    """Say in a line what the picture is of."""
    account = analysis.account
    return (
        f"{account.read:,} rows read = {account.kept:,} kept + {account.refused:,} refused + "
        f"{account.deduplicated:,} duplicates left out"
    )


def _lengths(
    title: str, what: str, kinds: tuple[tuple[str, str, Distribution], ...]
) -> HistogramPanel:
    """Draw distributions over common bins."""
    joined = kinds[0][2]
    for _, _, numbers in kinds[1:]:
        joined = joined.joined(numbers)
    bins = histogram(joined, _BINS)
    series = tuple(
        Series(name, colour, binned(numbers, bins.start, bins.width, len(bins.counts)))
        for name, colour, numbers in kinds
    )
    notes = tuple(
        f"{name}: median {numbers.median:,.1f}, mean {numbers.mean:,.1f}"
        for name, _, numbers in kinds
    )
    return HistogramPanel(title, "tokens", what, series, notes)


def _answers(analysis: "Analysis") -> HistogramPanel:
    lengths = analysis.lengths
    if analysis.bias is None:
        kinds: tuple[tuple[str, str, Distribution], ...] = (
            ("completion", BLUE, lengths["completion"]),
        )
        return _lengths("Completion", "completions", kinds)
    kinds = (
        ("chosen", BLUE, lengths["chosen"]),
        ("rejected", ORANGE, lengths["rejected"]),
    )
    return _lengths("Chosen and rejected", "completions", kinds)


def _difference(bias: LengthBias, difference: Distribution) -> HistogramPanel:
    low, high = (written(end, 2) for end in bias.effect_interval)
    least, most = bias.superiority_interval
    notes = (
        f"Cohen's d = {written(bias.effect, 2)} (95 %: {low} … {high})"
        if bias.varies
        else "Cohen's d is not defined: the lengths do not vary",
        f"P(chosen longer) = {bias.superiority:.3f} (95 %: {least:.3f} … {most:.3f})",
    )
    series = (Series("difference", GREEN, histogram(difference, _BINS)),)
    title = "Chosen − rejected, pair by pair"
    return HistogramPanel(title, "tokens", "pairs", series, notes, zero=True)


def _computing(found: Padding) -> StackPanel:
    answers = found.rows - found.prompts
    once = found.shared - answers
    repeated = found.prompts - once

    def padded(label: str, tokens: int) -> Stack:
        padding = tokens - found.rows
        parts = (once, answers, repeated, padding)
        return Stack(label, parts, f"{100 * padding / tokens:.1f} % padding")

    saved = f"{100 * found.saved:.1f} % less than unpadded rows"
    return StackPanel(
        f"Tokens computed, batches of {BATCH} groups",
        "tokens",
        (("prompt once", SKY), ("completions", BLUE), ("prompt again", ORANGE), ("padding", GREY)),
        (
            padded("padded, file order", found.in_order),
            padded("padded, by length", found.in_length_order),
            Stack("prompt shared", (once, answers, 0, 0), saved),
        ),
    )


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


def draw(analysis: "Analysis", path: Path) -> None:
    """Write the picture: SVG without any library, or PNG by matplotlib where ``path`` ends so.

    Raises:
        ValueError: The name ends otherwise, or the store is empty.
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    if not analysis.groups:
        raise ConfigError("there is no group to draw")
    title = f"{analysis.groups:,} preference groups"
    if analysis.are_pairs:
        title = f"{analysis.groups:,} preference pairs"
    shown = panels(analysis)
    if path.suffix == ".svg":
        path.write_text(svg(title, caption(analysis), shown), "utf-8")
    elif path.suffix == ".png":
        plot(path, title, caption(analysis), shown)
    else:
        raise ConfigError(f"{path}: a picture is .svg or .png")
