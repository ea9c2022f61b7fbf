"""Numbers in bins of a round width, and the bins as bars of text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from logratio.data.analysis.distribution import Distribution

_SHOWN = 0.995  # of the numbers have a bin of their own; the rest share one at each end
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many numbers lie in each bin.

    Attributes:
        start: The first number of the first bin.
        width: Whole numbers in each bin.
        counts: Numbers in each bin; at least one bin.
        below: Numbers before the first bin.
        beyond: Numbers after the last bin.
    """

    start: int
    width: int
    counts: tuple[int, ...]
    below: int
    beyond: int

    @property
    def end(self) -> int:
        """The first number after the last bin."""
        return self.start + self.width * len(self.counts)

    @property
    def edges(self) -> list[int]:
        """Where the bins begin, and where the last one ends."""
        return list(range(self.start, self.end + 1, self.width))

    def named(self) -> list[tuple[str, int]]:
        """Return each bin's name and count, the ends among them where they hold anything."""
        bins = [
            (f"{low:,}-{low + self.width - 1:,}" if self.width > 1 else f"{low:,}", count)
            for low, count in zip(self.edges, self.counts, strict=False)
        ]
        before = [(f"< {self.start:,}", self.below)] if self.below else []
        return before + bins + ([(f"≥ {self.end:,}", self.beyond)] if self.beyond else [])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "start": self.start,
            "width": self.width,
            "counts": list(self.counts),
            "below": self.below,
            "beyond": self.beyond,
        }


def histogram(numbers: Distribution, bins: int) -> Histogram:
    """Put numbers into bins of 1, 2 or 5 times a power of ten.

    Of many different numbers, 0.5 % at each end have no bin of their own, so that a few long texts
    do not push all others into one. Bins then begin at 0 unless the numbers lie far from it.

    Args:
        numbers: At least one.
        bins: Most bins.
    """
    low, high = numbers.quantile(1 - _SHOWN), numbers.quantile(_SHOWN)
    if numbers.largest - int(numbers.values[0]) < bins:
        low, high = int(numbers.values[0]), numbers.largest  # each has its own bin
    elif 0 < low < high / 2:
        low = 0
    width = next(width for width in _widths() if high // width - low // width < bins)
    start = low // width * width
    return binned(numbers, start, width, high // width - low // width + 1)


def binned(numbers: Distribution, start: int, width: int, bins: int) -> Histogram:
    """Put numbers into ``bins`` bins of ``width``, the first of which begins at ``start``."""
    at = (numbers.values - start) // width
    inside = (at >= 0) & (at < bins)
    counts = np.zeros(bins, np.int64)
    np.add.at(counts, at[inside], numbers.counts[inside])
    return Histogram(
        start,
        width,
        tuple(counts.tolist()),
        int(numbers.counts[at < 0].sum()),
        int(numbers.counts[at >= bins].sum()),
    )


def _widths() -> Iterator[int]:
    """Yield 1, 2, 5, 10, 20, 50 and so on."""
    scale = 1
    while True:
        yield from (scale, 2 * scale, 5 * scale)
        scale *= 10


def bars(bins: Sequence[tuple[str, int]], columns: int) -> list[str]:
    """Draw named counts as lines of at most ``columns`` characters; the longest bar is full."""
    names = max(len(name) for name, _ in bins)
    numbers = max(len(f"{count:,}") for _, count in bins)
    room = max(columns - names - numbers - 2, 1)
    most = max((count for _, count in bins), default=0) or 1
    return [
        f"{name:>{names}} {_bar(count / most * room)} {count:,}".rstrip() for name, count in bins
    ]


def _bar(length: float) -> str:
    eighths = round(length * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def side_by_side(panels: Mapping[str, list[str]], columns: int) -> list[str]:
    """Put blocks of lines under their titles, two in a row of ``columns`` characters."""
    half = columns // 2 - 1
    blocks = [[title, *lines] for title, lines in panels.items()]
    lines: list[str] = []
    for at in range(0, len(blocks), 2):
        left, right = blocks[at], blocks[at + 1] if at + 1 < len(blocks) else []
        rows = zip_longest(left, right, fillvalue="")
        lines += [f"{a:<{half}}  {b}".rstrip() for a, b in rows]
    return lines
