"""Statistics of a store's columns: distributions, histograms, 95 % intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, Store
from logratio.data.records import CANDIDATE, CHOSEN, REJECTED, Source

_Z = 1.959963984540054

Interval = tuple[float, float]


def wilson(share: float, count: float) -> Interval:
    """Return Wilson's score interval of a share that was seen in ``count`` independent trials.

    It stays inside [0, 1] and holds for shares of 0 and 1. For a mean of values in [0, 1] that may
    lie between (a tie counts one half) it is conservative: their variance is not larger.
    """
    if count <= 0:
        return 0.0, 1.0
    spread = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    middle = share + _Z**2 / (2 * count)
    scale = 1 + _Z**2 / count
    # Rounding may not push an end past the share itself, which lies on it at 0 and at 1.
    return min(share, (middle - spread) / scale), max(share, (middle + spread) / scale)


def written(value: float, digits: int, *, sign: bool = False) -> str:
    """Write a number with a minus that is one, and no −0; ``sign`` writes a plus too."""
    value = round(value, digits) or 0.0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def around(estimate: float, variance: float) -> Interval:
    """Return the normal interval of an estimate with this variance."""
    return estimate - _Z * sqrt(variance), estimate + _Z * sqrt(variance)


_DENSE = 1 << 22  # widest range that is counted in one array


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """Numbers and how often each occurs; exact, and small however long the column is.

    Attributes:
        values: Distinct numbers, rising: i64 [V].
        counts: How often each occurs, at least once: i64 [V].
    """

    values: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, column: NDArray[Any]) -> "Distribution":
        """Count a column of whole numbers, [N]; a copy of it is made where it is not i64."""
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
        """Return the distribution of the numbers of both."""
        values, where = np.unique(np.concatenate([self.values, other.values]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        return Distribution(values, counts)

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Their sum."""
        return int(self.values @ self.counts)

    @property
    def mean(self) -> float:
        """Their mean; 0 where there is none."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation with n − 1; 0 for less than two numbers."""
        if self.count < 2:
            return 0.0
        squares = float((self.values - self.mean) ** 2 @ self.counts)
        return float(np.sqrt(squares / (self.count - 1)))

    @property
    def median(self) -> float:
        """The middle one, or the mean of the two in the middle; 0 where there is none."""
        if not self.count:
            return 0.0
        return (self._at((self.count - 1) // 2) + self._at(self.count // 2)) / 2

    @property
    def largest(self) -> int:
        """The largest number; 0 where there is none."""
        return int(self.values[-1]) if self.count else 0

    def quantile(self, share: float) -> int:
        """Return the smallest number that at least this share of all does not exceed."""
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
        """Return the number of this rank, from 0."""
        return int(self.values[np.searchsorted(np.cumsum(self.counts), rank, side="right")])


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


_CHOSEN, _REJECTED, _CANDIDATE = map(ROLES.index, (CHOSEN, REJECTED, CANDIDATE))


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What is known of every group without its tokens.

    Attributes:
        prompts: Tokens of each prompt: u32 [G].
        completions: Tokens of each completion: u32 [N].
        counted: Of these, tokens that count: u32 [N].
        offsets: Where the completions of each group begin, and N: i64 [G+1].
        roles: Role number of each completion: u8 [N].
    """

    prompts: NDArray[np.uint32]
    completions: NDArray[np.uint32]
    counted: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    roles: NDArray[np.uint8]

    @classmethod
    def of(cls, store: Store) -> "Columns":
        """Read the columns of a store: some 30 bytes a pair."""
        return cls(
            store.prompt_lengths(),
            store.completion_lengths(),
            store.counted_lengths(),
            store.completion_offsets(),
            store.roles(),
        )

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.prompts)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Completions of each group: i64 [G]."""
        return np.diff(self.offsets)

    def compared(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the completions that are compared, the better and the worse: i64 [C], i64 [C].

        Of a pair these are chosen and rejected, of a list from the best to the worst its two ends.
        """
        several = self.sizes > 1
        first, last = self.offsets[:-1][several], self.offsets[1:][several] - 1
        is_ordered = np.isin(self.roles[first], (_CHOSEN, _CANDIDATE))
        is_ordered &= np.isin(self.roles[last], (_REJECTED, _CANDIDATE))
        return first[is_ordered], last[is_ordered]

    def judged_alone(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the completions with a thumb up or down and no sibling: i64 [A], i64 [B]."""
        single = self.offsets[:-1][self.sizes == 1]
        roles = self.roles[single]
        return single[roles == _CHOSEN], single[roles == _REJECTED]

    def are_pairs(self) -> bool:
        """Say whether every group is one chosen and one rejected completion."""
        return (
            self.groups > 0
            and bool((self.sizes == 2).all())
            and bool((self.roles[::2] == _CHOSEN).all())
            and bool((self.roles[1::2] == _REJECTED).all())
        )

    def longest(self) -> NDArray[np.int64]:
        """Return the tokens of each group's longest sequence, prompt and completion: i64 [G]."""
        if not self.groups:
            return np.zeros(0, np.int64)
        longest = np.maximum.reduceat(self.completions, self.offsets[:-1])
        return np.add(self.prompts, longest, dtype=np.int64)

    def together(self) -> NDArray[np.int64]:
        """Return the tokens of each group, its prompt once: i64 [G]."""
        if not self.groups:
            return np.zeros(0, np.int64)
        answers = np.add.reduceat(self.completions, self.offsets[:-1], dtype=np.int64)
        return np.add(self.prompts, answers, dtype=np.int64)


class Places:
    """File and line of each group, by its number; files are named where the store names them."""

    def __init__(self, store: Store) -> None:
        self._files, self._lines = store.sources()
        self._names: list[Any] = json.loads(store.metadata).get("files", [])

    def __getitem__(self, group: int) -> str:
        number = int(self._files[group])
        name = self._names[number] if number < len(self._names) else f"file {number}"
        return str(Source(str(name), int(self._lines[group])))
