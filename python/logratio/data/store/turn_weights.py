"""Weights of turns other than 0 and 1: numbered in the mask of a store, listed in its metadata."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import reduce
from hashlib import sha256
from operator import add
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logratio._rust import CorruptStoreError as CorruptStoreError
from logratio._rust import SharedLayout, Store
from logratio.errors import ConfigError
from logratio.forecast import count

FIRST = 2
"""Number of the first weight in a mask; 0 and 1 are weights themselves."""

MOST = 256 - FIRST
"""Most weights that a mask can number."""

NAME = "turn_weights"
"""Key of the weights in a store's metadata."""

IMITATES_BAD_TURNS = False
"""Whether the imitation of answers (`sft`, `raft`) is defined for turns with weights below 0."""

_TOGETHER = 1 << 16
"""Completions whose masks are in memory at a time."""


@dataclass(frozen=True)
class TurnWeights:
    """The weights of turns in a store, other than 0 and 1.

    Attributes:
        values: The weights in the order of their numbers, which begin with `FIRST`.

    Example:
        >>> weights = TurnWeights()
        >>> weights.numbered(np.array([0.0, 1.0, -0.5, 2.0, -0.5])).tolist()
        [0, 1, 2, 3, 2]
        >>> weights.values
        [-0.5, 2.0]
    """

    values: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, store: Store) -> "TurnWeights":
        """Return the weights in a store.

        Raises:
            CorruptStoreError: Its mask numbers weights, which its metadata do not list.
        """
        if not store.is_weighted:
            return cls()
        values = json.loads(store.metadata).get(NAME)
        if not isinstance(values, list):
            raise CorruptStoreError(f"{store}: its mask numbers weights, but it lists none")
        return cls(values)

    def numbered(self, weights: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Return the mask for the weights of tokens; new weights get the next numbers.

        Raises:
            ConfigError: There are more than `MOST`.
        """
        is_plain = (weights == 0) | (weights == 1)
        mask = np.where(is_plain, weights, 0).astype(np.uint8)
        if is_plain.all():
            return mask
        found, places = np.unique(weights[~is_plain], return_index=True)
        for value in found[np.argsort(places)].tolist():
            mask[weights == value] = self._number(value)
        return mask

    def _number(self, value: float) -> int:
        if value not in self.values:
            if len(self.values) == MOST:
                raise ConfigError(
                    f"the data has more than {MOST} different weights of turns: round them"
                )
            self.values.append(value)
        return FIRST + self.values.index(value)

    def at(self, mask: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Return the weights of tokens from their mask.

        Raises:
            CorruptStoreError: The mask has a number without a weight.
        """
        highest = int(mask.max(initial=0))
        if highest >= FIRST + len(self.values):
            raise CorruptStoreError(
                f"the mask has the number {highest}, for which there is no weight"
            )
        return np.array([0.0, 1.0, *self.values])[mask]


def whole_mask(store: Store, layout: SharedLayout) -> NDArray[np.uint8]:
    """Return the mask of a layout's completions, with the numbers of weights."""
    if store.is_weighted:
        return store.mask(layout.completions)
    return layout.completion_mask.astype(np.uint8)


def data_digest(store: Store) -> str:
    """Return the hash of a store's content in hex, with the values of its turns' weights."""
    if not store.is_weighted:
        return store.digest
    values = json.dumps(TurnWeights.of(store).values)
    return sha256(f"{store.digest} {values}".encode()).hexdigest()


def extremes(store: Store) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lowest and the highest weight of a counted token in each group, `[G]` each."""
    offsets = store.completion_offsets()
    low, high = (np.concatenate(side) for side in zip(*_extremes(store), strict=True))
    return np.minimum.reduceat(low, offsets[:-1]), np.maximum.reduceat(high, offsets[:-1])


def _extremes(
    store: Store,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield both for some completions after the others."""
    for own, each in _weights(store):
        starts = np.cumsum(own) - own
        low = np.minimum.reduceat(np.where(each == 0, np.inf, each), starts)
        yield low, np.maximum.reduceat(np.where(each == 0, -np.inf, each), starts)


def _weights(store: Store) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Yield the lengths of some completions and the weights of their tokens, after the others."""
    table, lengths = TurnWeights.of(store), store.completion_lengths().astype(np.int64)
    for first in range(0, len(lengths), _TOGETHER):
        own = lengths[first : first + _TOGETHER]
        yield own, table.at(store.mask(np.arange(first, first + len(own))))


def with_weights(store: Store) -> NDArray[np.bool_]:
    """Return whether a turn of each group has another weight than 0 and 1, bool `[G]`."""
    if not store.is_weighted:
        return np.zeros(len(store), bool)
    low, high = extremes(store)
    found: NDArray[np.bool_] = (low != 1) | (high != 1)
    return found


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """How many turns or tokens have another weight than 0 and 1.

    Attributes:
        unit: What is counted.
        weighted: How many have such a weight; at least 1.
        completions: How many completions contain them.
        bad: How many of them have a weight below 0.
        bad_completions: How many completions contain these.
        least: The smallest such weight.
        largest: The largest.
    """

    unit: Literal["turn", "token"]
    weighted: int
    completions: int
    bad: int
    bad_completions: int
    least: float
    largest: float

    @classmethod
    def of(
        cls,
        unit: Literal["turn", "token"],
        weights: NDArray[np.float64],
        owners: NDArray[np.int64],
    ) -> "WeightCounts | None":
        """Count the weights of turns or tokens; return None if all are 0 or 1.

        Args:
            unit: What the weights belong to.
            weights: The weights, `[S]`.
            owners: The completion of each, `[S]`.

        Example:
            >>> str(WeightCounts.of("turn", np.array([1, -1, 0.5]), np.array([0, 0, 1])))
            'turns with a weight other than 0 and 1: 2 in 2 completions, −1 … 0.5; below 0: 1 in 1'
        """
        is_other, is_bad = (weights != 0) & (weights != 1), weights < 0
        if not is_other.any():
            return None
        return cls(
            unit,
            int(is_other.sum()),
            len(np.unique(owners[is_other])),
            int(is_bad.sum()),
            len(np.unique(owners[is_bad])),
            float(weights[is_other].min()),
            float(weights[is_other].max()),
        )

    def __add__(self, other: "WeightCounts") -> "WeightCounts":
        return WeightCounts(
            self.unit,
            self.weighted + other.weighted,
            self.completions + other.completions,
            self.bad + other.bad,
            self.bad_completions + other.bad_completions,
            min(self.least, other.least),
            max(self.largest, other.largest),
        )

    def __str__(self) -> str:
        what = "turns" if self.unit == "turn" else "tokens of turns"
        bad = f"below 0: {self.bad:,} in {self.bad_completions:,}" if self.bad else "none below 0"
        ends = dict.fromkeys((self.least, self.largest))
        extent = " … ".join(f"{end:g}" for end in ends).replace("-", "−")
        return (
            f"{what} with a weight other than 0 and 1: {self.weighted:,} in "
            f"{count(self.completions, 'completion')}, {extent}; {bad}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return asdict(self)


def weight_counts(store: Store) -> WeightCounts | None:
    """Count the tokens of a store with other weights than 0 and 1; return None for none."""
    if not store.is_weighted:
        return None
    found = (
        WeightCounts.of("token", each, np.repeat(np.arange(len(own)), own))
        for own, each in _weights(store)
    )
    some = [counts for counts in found if counts]
    return reduce(add, some) if some else None
