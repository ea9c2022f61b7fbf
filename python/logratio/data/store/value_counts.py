"""How many completions have a score, rank, margin or weight, and in which range."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import VALUES
from logratio.forecast import count


@dataclass(frozen=True, slots=True)
class ValueCount:
    """The numbers of one kind, such as the scores.

    Attributes:
        count: How many completions have one; at least 1.
        total: Their sum.
        least: The smallest.
        largest: The largest.
    """

    count: int
    total: float
    least: float
    largest: float

    def __add__(self, other: "ValueCount") -> "ValueCount":
        return ValueCount(
            self.count + other.count,
            self.total + other.total,
            min(self.least, other.least),
            max(self.largest, other.largest),
        )

    def __str__(self) -> str:
        mean = self.total / self.count
        return (
            f"of {count(self.count, 'completion')}, {self.least:g} … {self.largest:g}, "
            f"mean {mean:.4g}"
        ).replace("-", "−")


ValueCounts = dict[str, ValueCount]
"""The count of each kind of number that occurs, by its name in `logratio._rust.VALUES`."""


def value_counts(values: NDArray[np.float32]) -> ValueCounts:
    """Count the values of completions.

    Args:
        values: float32 `[N, 4]`, in the order of `logratio._rust.VALUES`; NaN where there is none.
    """
    found: ValueCounts = {}
    for name, column in zip(VALUES, values.T, strict=True):
        own = column[~np.isnan(column)]
        if len(own):
            total = float(own.sum(dtype=np.float64))
            found[name] = ValueCount(len(own), total, float(own.min()), float(own.max()))
    return found


def added(one: ValueCounts, other: ValueCounts) -> ValueCounts:
    """Return the counts of both together."""
    both = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    every = one | other | both
    return {name: every[name] for name in VALUES if name in every}


def to_dict(counts: ValueCounts) -> dict[str, dict[str, float]]:
    """Return counts as JSON values."""
    return {name: asdict(one) for name, one in counts.items()}


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> ValueCounts:
    """Restore counts from the result of `to_dict`."""
    return {name: ValueCount(**one) for name, one in values.items()}


def to_lines(counts: ValueCounts) -> list[str]:
    """Return a line for each kind of number that occurs."""
    return [f"{name}s {one}" for name, one in counts.items()]
