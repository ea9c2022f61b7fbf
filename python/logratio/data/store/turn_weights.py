"""Weights of turns other than 0 and 1: numbered in the mask of a store, listed in its metadata."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from logratio._rust import CorruptStoreError as CorruptStoreError
from logratio._rust import SharedLayout, Store
from logratio.errors import ConfigError

FIRST = 2
"""Number of the first weight in a mask; 0 and 1 are weights themselves."""

MOST = 256 - FIRST
"""Most weights that a mask can number."""

NAME = "turn_weights"
"""Key of the weights in a store's metadata."""

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
    weights, offsets = TurnWeights.of(store), store.completion_offsets()
    lengths = store.completion_lengths().astype(np.int64)
    found = [*_extremes(store, weights, lengths)]
    low, high = (np.concatenate(side) for side in zip(*found, strict=True))
    return np.minimum.reduceat(low, offsets[:-1]), np.maximum.reduceat(high, offsets[:-1])


def _extremes(
    store: Store, weights: TurnWeights, lengths: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield both for some completions after the others."""
    for first in range(0, len(lengths), _TOGETHER):
        own = lengths[first : first + _TOGETHER]
        mask = store.mask(np.arange(first, first + len(own)))
        each, starts = weights.at(mask), np.cumsum(own) - own
        low = np.minimum.reduceat(np.where(mask == 0, np.inf, each), starts)
        yield low, np.maximum.reduceat(np.where(mask == 0, -np.inf, each), starts)
