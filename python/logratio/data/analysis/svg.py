"""Panels as an SVG, by hand: it needs no library, and every number stands in the file as text."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil, floor, log10
from xml.sax.saxutils import escape

from logratio.data.analysis.plots import HistogramPanel, Panel, Series, StackPanel
from logratio.data.analysis.statistics import Histogram

_PANEL = (400, 280)  # width and height
_COLUMNS = 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 62, 44  # room around a panel's axes
_HEAD = 62
_ROOM = 56  # for the name of what lies outside of the bins
_INK, _FAINT = "#222222", "#dddddd"
_STYLE = "font-family=\"'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif\""


def svg(title: str, caption: str, panels: Sequence[Panel]) -> str:
    """Draw panels, two in a row."""
    rows = ceil(len(panels) / _COLUMNS)
    width, height = _PANEL[0] * _COLUMNS, _HEAD + _PANEL[1] * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" {_STYLE} font-size="11" fill="{_INK}">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(caption)}</desc>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(16, 26, title, size=16, weight="bold"),
        _text(16, 46, caption, size=12),
    ]
    for number, panel in enumerate(panels):
        row, column = divmod(number, _COLUMNS)
        x, y = column * _PANEL[0], _HEAD + row * _PANEL[1]
        parts.append(f'<g transform="translate({x} {y})">')
        if isinstance(panel, HistogramPanel):
            parts += _histograms(panel)
        else:  # as wide as there is room
            parts += _stacks(panel, _WIDE if panel is panels[-1] and column == 0 else _X)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """From numbers to places on a line."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._unit = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self._low) * self._unit, 2)


_X = (_LEFT, _PANEL[0] - _RIGHT)
_START = 48  # of stacks
_WIDE = (_LEFT, _COLUMNS * _PANEL[0] - _RIGHT)
_Y = (_PANEL[1] - _BOTTOM, _TOP)


def _histograms(panel: HistogramPanel) -> Iterator[str]:
    bins = panel.series[0].bins
    below = any(series.bins.below for series in panel.series)
    beyond = any(series.bins.beyond for series in panel.series)
    low, high = bins.start - below * bins.width * 2, bins.end + beyond * bins.width * 2
    most = max(max(*_all(series.bins), 1) for series in panel.series)
    x, y = _Scale(low, high, *_X), _Scale(0, most * 1.05, *_Y)
    yield _text(_LEFT, 20, panel.title, size=13, weight="bold")
    yield from _y_axis(y, most, panel.y_label)
    for series in panel.series:
        yield from _steps(series, x, y, see_through=len(panel.series) > 1)
    if panel.zero:
        yield _line(x(0), _Y[0], x(0), _Y[1], _INK, dashed=True)
    ends = (_X[0] + below * _ROOM, _X[1] - beyond * _ROOM)
    shown = [tick for tick in ticks(bins.start, bins.end, 6) if ends[0] <= x(tick) <= ends[1]]
    yield from _x_axis(x, shown, panel.x_label, _X)
    if below:
        yield _text(_X[0], _Y[0] + 14, f"< {short(bins.start)}", "middle")
    if beyond:
        yield _text(_X[1], _Y[0] + 14, f"≥ {short(bins.end)}", "end")
    yield from _notes(panel)


def _all(bins: Histogram) -> list[int]:
    return [bins.below, *bins.counts, bins.beyond]


def _steps(series: Series, x: _Scale, y: _Scale, *, see_through: bool) -> Iterator[str]:
    """Draw a bar a bin, with its numbers as a tooltip; what lies outside stands apart."""
    bins, opacity = series.bins, 0.5 if see_through else 0.85
    yield f'<g fill="{series.colour}" fill-opacity="{opacity}">'
    for (low, high), count in zip(pairwise(bins.edges), bins.counts, strict=True):
        name = f"{low:,} to {high - 1:,}" if high - low > 1 else f"{low:,}"
        yield _bar(x(low), x(high), y, count, f"{series.label}, {name} tokens: {count:,}")
    width = bins.width
    for at, count, name in (
        (bins.start - 2 * width, bins.below, f"below {bins.start:,}"),
        (bins.end + width, bins.beyond, f"{bins.end:,} or more"),
    ):
        if count:
            label = f"{series.label}, {name} tokens: {count:,}"
            yield _bar(x(at), x(at + width), y, count, label)
    yield "</g>"


def _bar(left: float, right: float, y: _Scale, count: int, label: str) -> str:
    top, width = y(count), round(right - left, 2)
    return (
        f'<rect x="{left}" y="{top}" width="{width}" height="{round(_Y[0] - top, 2)}">'
        f"<title>{escape(label)}</title></rect>"
    )


def _notes(panel: HistogramPanel) -> Iterator[str]:
    """Write the numbers below the title, beside the colours that they belong to."""
    has_key = len(panel.series) > 1
    for number, note in enumerate(panel.notes):
        y = 36 + 15 * number
        yield _text(_LEFT + 16 * has_key, y, note)
        if has_key:
            yield (
                f'<rect x="{_LEFT}" y="{y - 9}" width="10" height="10" '
                f'fill="{panel.series[number].colour}" fill-opacity="0.6"/>'
            )


def _stacks(panel: StackPanel, across: tuple[int, int]) -> Iterator[str]:
    most = max(sum(stack.parts) for stack in panel.stacks)
    x = _Scale(0, most * 1.02, *across)
    yield _text(_LEFT, 20, panel.title, size=13, weight="bold")
    at = float(_LEFT)
    for name, colour in panel.parts:
        yield f'<rect x="{at}" y="27" width="10" height="10" fill="{colour}"/>'
        yield _text(at + 14, 36, name)
        at += 28 + 6 * len(name)
    height = (_Y[0] - _START) / len(panel.stacks)
    for number, stack in enumerate(panel.stacks):
        top = _START + number * height
        yield _text(_LEFT, top + 13, f"{stack.label}: {sum(stack.parts):,} tokens, {stack.note}")
        start = 0
        for (name, colour), count in zip(panel.parts, stack.parts, strict=True):
            if count:
                yield (
                    f'<rect x="{x(start)}" y="{top + 18:.1f}" '
                    f'width="{round(x(start + count) - x(start), 2)}" '
                    f'height="{height - 26:.1f}" fill="{colour}" fill-opacity="0.85">'
                    f"<title>{escape(f'{stack.label}, {name}: {count:,} tokens')}</title></rect>"
                )
            start += count
    yield from _x_axis(x, ticks(0, most, 6), panel.x_label, across)


def _x_axis(x: _Scale, shown: Sequence[int], label: str, across: tuple[int, int]) -> Iterator[str]:
    yield _line(across[0], _Y[0], across[1], _Y[0], _INK)
    for tick in shown:
        yield _line(x(tick), _Y[0], x(tick), _Y[0] + 4, _INK)
        yield _text(x(tick), _Y[0] + 14, short(tick), "middle")
    yield _text(sum(across) / 2, _Y[0] + 32, label, "middle")


def _y_axis(y: _Scale, most: float, label: str) -> Iterator[str]:
    for tick in ticks(0, most, 5):
        yield _line(_X[0], y(tick), _X[1], y(tick), _FAINT)
        yield _text(_X[0] - 6, y(tick) + 4, short(tick), "end")
    middle = (_Y[0] + _Y[1]) / 2
    yield (
        f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(label)}</text>"
    )


def ticks(low: float, high: float, most: int) -> list[int]:
    """Return at most ``most`` round whole numbers from ``low`` to ``high``, 1, 2 or 5 apart."""
    least = max((high - low) / most, 1)
    scale = 10 ** floor(log10(least))
    step = next(
        step
        for step in (scale, 2 * scale, 5 * scale, 10 * scale)
        if floor(high / step) - ceil(low / step) < most
    )
    return [step * k for k in range(ceil(low / step), floor(high / step) + 1)]


def short(number: int) -> str:
    """Write a number for an axis: 1,500, 20 k, 3 M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if abs(number) >= size:
            return f"{number / (1000 if letter == 'k' else size):g} {letter}".replace("-", "−")
    return f"{number:,}".replace("-", "−")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"{dashes}/>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", *, size: int = 11, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )
