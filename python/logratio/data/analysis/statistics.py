"""Statistics of a store's columns: distributions and histograms."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, Store
from logratio.data.records import CANDIDATE, CHOSEN, REJECTED, Source


def written(value: float, digits: int, *, sign: bool = False) -> str:
    """Format a number with a true minus sign and without −0; ``sign`` also writes a plus."""
    value = round(value, digits) or 0.0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


_DENSE = 1 << 22  # widest range that is counted in a dense array


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """Distinct numbers with their counts: exact, and small even for a long column.

    Attributes:
        values: int64 `[V]`, the distinct numbers, ascending.
        counts: int64 `[V]`, how often each occurs, at least once.
    """

    values: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, column: NDArray[Any]) -> "Distribution":
        """Count a column of integers `[N]`; it is copied unless it is int64."""
        if not len(column):
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))
        low, high = int(column.min()), int(column.max())
        if high - low >= _DENSE:
            values, counts = np.unique(column, return_counts=True)
            return cls(values.astype(np.int64), counts.astype(np.int64))
        dense = np.bincount(column.astype(np.int64) - low)
        values = np.flatnonzero(dense)
        return cls(values + low, dense[values])

    def joined(self, other: "Distribution") -> "Distribution":
        """Return the distribution of both together."""
        values, where = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        return Distribution(values, counts)

    @property
    def count(self) -> int:
        """Count of all numbers."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Sum of all numbers."""
        return int(self.values @ self.counts)

    @property
    def mean(self) -> float:
        """Mean; 0 if empty."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation with n − 1; 0 for fewer than two numbers."""
        if self.count < 2:
            return 0.0
        squares = float((self.values - self.mean) ** 2 @ self.counts)
        return float(np.sqrt(squares / (self.count - 1)))

    @property
    def median(self) -> float:
        """Median; 0 if empty."""
        if not self.count:
            return 0.0
        return (self._at((self.count - 1) // 2) + self._at(self.count // 2)) / 2

    @property
    def largest(self) -> int:
        """Largest number; 0 if empty."""
        return int(self.values[-1]) if self.count else 0

    def quantile(self, share: float) -> int:
        """Return the smallest number that at least this share of all numbers does not exceed."""
        return self._at(max(int(np.ceil(share * self.count)) - 1, 0)) if self.count else 0

    def above(self, limit: int) -> int:
        """Count the numbers above a limit."""
        return int(self.counts[self.values > limit].sum())

    def to_dict(self) -> dict[str, Any]:
        """Return its summary as JSON values."""
        return {
            "count": self.count,
            "total": self.total,
            "mean": self.mean,
            "deviation": self.deviation,
            "median": self.median,
            "p95": self.quantile(0.95),
            "largest": self.largest,
        }

    def _at(self, rank: int) -> int:
        """Return the number at this rank, from 0."""
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank, side="right")])


_SHOWN = 0.995  # quantile of the last bin; the rest share one bin at each end
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of numbers in bins of equal width.

    Attributes:
        start: First number of the first bin.
        width: Width of each bin.
        counts: Count of each bin; at least one bin.
        below: Count of the numbers below the first bin.
        beyond: Count of the numbers above the last bin.
    """

    start: int
    width: int
    counts: tuple[int, ...]
    below: int
    beyond: int

    @property
    def end(self) -> int:
        """First number after the last bin."""
        return self.start + self.width * len(self.counts)

    @property
    def edges(self) -> list[int]:
        """The starts of all bins, and the end of the last."""
        return list(range(self.start, self.end + 1, self.width))

    def named(self) -> list[tuple[str, int]]:
        """Return each bin's name and count, including both ends if they are not empty."""
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
    """Sort numbers into bins whose width is 1, 2 or 5 times a power of ten.

    Of many distinct numbers, 0.5 % at each end share one bin, so that a few long texts do not push
    all others into one. Bins then begin at 0 unless all numbers are far from it.

    Args:
        numbers: At least one number.
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
    """Sort numbers into ``bins`` bins of ``width``, of which the first begins at ``start``."""
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
    """Draw named counts as bars in lines of at most ``columns`` characters."""
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
    """Lay out titled blocks of lines, two per row of ``columns`` characters."""
    half = columns // 2 - 1
    blocks = [[title, *lines] for title, lines in panels.items()]
    lines: list[str] = []
    for at in range(0, len(blocks), 2):
        left, right = blocks[at], blocks[at + 1] if at + 1 < len(blocks) else []
        rows = zip_longest(left, right, fillvalue="")
        lines += [f"{a:<{half}}  {b}".rstrip() for a, b in rows]
    return lines


_CHOSEN, _REJECTED, _CANDIDATE = map(ROLES.index, (CHOSEN, REJECTED, CANDIDATE))
_MISMATCHED = ROLES.index("mismatched")


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The columns of a store except its tokens.

    Attributes:
        prompts: uint32 `[G]`, tokens of each prompt.
        completions: uint32 `[N]`, tokens of each completion.
        counted: uint32 `[N]`, trained tokens of each completion.
        offsets: int64 `[G+1]`, the first completion of each group, and N.
        roles: uint8 `[N]`, index of each completion's role in `logratio._rust.ROLES`.
    """

    prompts: NDArray[np.uint32]
    completions: NDArray[np.uint32]
    counted: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    roles: NDArray[np.uint8]

    @classmethod
    def of(cls, store: Store) -> "Columns":
        """Read the columns of a store, about 30 bytes per pair."""
        return cls(
            store.prompt_lengths(),
            store.completion_lengths(),
            store.counted_lengths(),
            store.completion_offsets(),
            store.roles(),
        )

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.prompts)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 `[G]`, completions of each group."""
        return np.diff(self.offsets)

    def compared(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the better and the worse completion of each comparison, int64 `[C]` each.

        In a pair these are chosen and rejected, in a ranked list its first and last.
        """
        several = self.sizes > 1
        first, last = self.offsets[:-1][several], self.offsets[1:][several] - 1
        is_ordered = np.isin(self.roles[first], (_CHOSEN, _CANDIDATE))
        is_ordered &= np.isin(self.roles[last], (_REJECTED, _CANDIDATE))
        return first[is_ordered], last[is_ordered]

    def judged_alone(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the good and the bad completions of unpaired feedback, int64 `[A]` and `[B]`.

        The answer to another prompt that KTO adds to a group is not counted.
        """
        is_added = self.roles[self.offsets[1:] - 1] == _MISMATCHED
        single = self.offsets[:-1][self.sizes - is_added == 1]
        roles = self.roles[single]
        return single[roles == _CHOSEN], single[roles == _REJECTED]

    def are_pairs(self) -> bool:
        """Return whether every group is one chosen and one rejected completion."""
        return (
            self.groups > 0
            and bool((self.sizes == 2).all())
            and bool((self.roles[::2] == _CHOSEN).all())
            and bool((self.roles[1::2] == _REJECTED).all())
        )

    def longest(self) -> NDArray[np.int64]:
        """Return the length of each group's longest prompt with completion, int64 `[G]`."""
        if not self.groups:
            return np.zeros(0, np.int64)
        longest = np.maximum.reduceat(self.completions, self.offsets[:-1])
        return np.add(self.prompts, longest, dtype=np.int64)

    def together(self) -> NDArray[np.int64]:
        """Return the tokens of each group with its prompt once, int64 `[G]`."""
        if not self.groups:
            return np.zeros(0, np.int64)
        answers = np.add.reduceat(self.completions, self.offsets[:-1], dtype=np.int64)
        return np.add(self.prompts, answers, dtype=np.int64)


class Places:
    """File and line of each group, by its number; ``file N`` if the store has no file names."""

    def __init__(self, store: Store) -> None:
        self._files, self._lines = store.sources()
        self._names: list[Any] = json.loads(store.metadata).get("files", [])

    def __getitem__(self, group: int) -> str:
        number = int(self._files[group])
        name = self._names[number] if number < len(self._names) else f"file {number}"
        return str(Source(str(name), int(self._lines[group])))
