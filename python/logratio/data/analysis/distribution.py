"""How often each whole number occurs: all that the statistics of a large column need."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
