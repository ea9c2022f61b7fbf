"""What the picture of a data report shows, before it is drawn."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from logratio.data.analysis.distribution import Distribution
from logratio.data.analysis.histograms import Histogram, binned, histogram
from logratio.data.analysis.intervals import written
from logratio.data.analysis.lengths import LengthBias
from logratio.data.analysis.padding import BATCH, Padding

if TYPE_CHECKING:
    from logratio.data.analysis.whole import Analysis

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
