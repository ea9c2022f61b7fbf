"""A store's completions and their cached log-probs, stretch by stretch; no torch."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logratio._rust import CacheReader, SharedLayout, Store
from logratio.cache import NoReferenceError, ReferenceCache
from logratio.cache.reading import open_reader
from logratio.errors import LogratioError

STRETCH_TOKENS = 2**20
"""Tokens looked up together: some 20 MB of ids and log-probs."""

FIELDS = (
    *("input_ids", "target_ids", "completion_mask", "completion_offsets", "prompt_lengths"),
    *("completion_lengths", "group_sizes", "roles", "groups", "completions"),
)


class MissingLogpsError(LogratioError, ValueError):
    """There is no such reference in the cache, or it lacks log-probs of the data."""


def open_reference(
    cache: str | Path, name: str | None = None, *, sums: bool = False
) -> CacheReader:
    """Open the log-probs of one reference below a cache's root, without looking at its model.

    Args:
        cache: The root that `logratio precompute` filled.
        name: Name of the reference's folder there, or how it begins; may be left out where there
            is one reference only.
        sums: The cache holds sums only.

    Raises:
        MissingLogpsError: No reference is named so, or several are.
        DamagedFingerprintError, CorruptCacheError: The cache was altered.
    """
    try:
        stored = ReferenceCache(cache).reference(name, sums=sums)
    except NoReferenceError as error:
        raise MissingLogpsError(str(error)) from error
    stored.check()
    return open_reader(stored)


class CachedLogps:
    """The reference's log-probs of a store's completions; keys are joined to rows once, here.

    Attributes:
        store: `N` completions.
        missing: Completions that the cache lacks.
    """

    def __init__(self, store: Store, reader: CacheReader, *, sums: bool = False) -> None:
        self.store, self._reader, self._sums = store, reader, sums
        self._rows = reader.join(store.sum_keys() if sums else store.keys())
        self.missing = int((self._rows < 0).sum())

    def check(self, source: object, advice: str) -> None:
        """Refuse to go on where something is missing.

        Raises:
            MissingLogpsError: With the number of completions and `advice`.
        """
        if self.missing:
            raise MissingLogpsError(
                f"{source}: {self.missing:,} of {len(self._rows):,} completions are not in the "
                f"cache; {advice}"
            )

    def stretches(self) -> Iterator[SharedLayout]:
        """Yield all groups in their order, laid out end to end, some at a time."""
        ends = np.cumsum(self.store.shared_lengths(), dtype=np.int64)
        first = 0
        while first < len(ends):
            done = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, done + STRETCH_TOKENS, "right")))
            yield self.store.shared_layout(np.arange(first, stop), fields=FIELDS)
            first = stop

    def per_token(self, layout: SharedLayout) -> NDArray[np.float32]:
        """Return the log-prob of every completion token of a stretch, float32 `[S]`, in nats.

        Raises:
            MissingLogpsError: The cache holds sums only.
        """
        if self._sums:
            raise MissingLogpsError("the cache holds sums only, no log-prob of a token")
        _, logps = self._reader.read(self._rows[layout.completions])
        return logps

    def sums(
        self, layout: SharedLayout, weights: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Add up the log-probs of each completion of a stretch.

        Args:
            layout: `N` completions of `S` tokens.
            weights: float64 `[S]`; None: 1 for every token that counts.

        Returns:
            float64 `[N]`, in nats.

        Raises:
            MissingLogpsError: Weights are given and the cache holds sums only.
        """
        if self._sums and weights is None:
            return self._reader.read_sums(self._rows[layout.completions])[1]
        counted = layout.completion_mask if weights is None else weights
        weighted = self.per_token(layout) * counted.astype(np.float64)
        return np.add.reduceat(weighted, layout.completion_offsets[:-1])


def counted_places(layout: SharedLayout) -> NDArray[np.int64]:
    """Number the tokens that count within their completion, from 1 on: int64 `[S]`."""
    counted = np.cumsum(layout.completion_mask, dtype=np.int64)
    first = layout.completion_offsets[:-1]
    before = counted[first] - layout.completion_mask[first]
    places: NDArray[np.int64] = counted - np.repeat(before, np.diff(layout.completion_offsets))
    return places
