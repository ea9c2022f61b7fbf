"""The reference's log-probs out of a cache, by row, and what may go into one."""

from pathlib import Path

import numpy as np
from torch import Tensor

from logratio._rust import CacheReader, Store
from logratio.data import source_names
from logratio.errors import LogratioError
from logratio.logps.tensors import Batch, Layout, TargetTokens, onto
from logratio.training import dates
from logratio.training.config import TrainConfig
from logratio.training.fingerprint import model_fingerprint
from logratio.training.models import precision_of
from logratio.training.reference import (
    PerToken,
    StaleCacheError,
    cache_folder,
    holds_sums_only,
    open_cache,
    sums_folder,
)

HIGHEST = 1e-3
"""A log-prob above 0 by more is no rounding: the cache refuses it too."""


class ImpossibleLogpError(LogratioError, ArithmeticError):
    """A log-prob that no model can mean: not finite, or above 0."""


class CachedReference(PerToken):
    """Log-probs read from a cache by row; keys are joined to rows once, here."""

    def __init__(self, store: Store, reader: CacheReader, folder: Path) -> None:
        self._reader, self.folder = reader, folder
        self._rows = _found(reader.join(store.keys()), store, folder)

    def over(self, store: Store) -> "CachedReference":
        """Return the same cache's log-probs of another store."""
        return CachedReference(store, self._reader, self.folder)

    def logps(self, batch: Batch) -> Tensor:
        """Return float32 `[S]` as they were written."""
        return onto(self._read(batch.targets), batch.targets.target_ids.device)

    def sums(self, batch: Batch) -> Tensor:
        """Return float64 `[N]`, added up on the host: a number a completion goes to the device."""
        targets = batch.targets
        return onto(targets.host_sums(self._read(targets)), targets.target_ids.device)

    def _read(self, targets: TargetTokens) -> np.ndarray:
        _, logps = self._reader.read(self._rows[targets.rows])
        if len(logps) != len(targets.target_ids):
            raise StaleCacheError(
                f"[E604] the cache holds {len(logps)} tokens where the batch has "
                f"{len(targets.target_ids)}"
            )
        return logps


class CachedSums:
    """Sums read from a cache that holds nothing else; enough for every loss of sums."""

    def __init__(self, store: Store, reader: CacheReader, folder: Path) -> None:
        self._reader, self.folder = reader, folder
        self._rows = _found(reader.join(store.sum_keys()), store, folder)

    def over(self, store: Store) -> "CachedSums":
        """Return the same cache's sums of another store."""
        return CachedSums(store, self._reader, self.folder)

    def logps(self, batch: Batch) -> Tensor:
        """Refuse: they were never written.

        Raises:
            StaleCacheError: always.
        """
        raise StaleCacheError(
            f"{self.folder}: this cache holds sums of completions, and log-probs of tokens are "
            "asked for; run `logratio precompute` without --sums-only"
        )

    def sums(self, batch: Batch) -> Tensor:
        """Return float64 `[N]` as they were written."""
        targets = batch.targets
        counts, sums = self._reader.read_sums(self._rows[targets.rows])
        lengths = targets.host_sums(np.ones(len(targets.counted))).astype(np.int64)
        if not np.array_equal(counts, lengths):
            raise StaleCacheError(
                f"[E604] the cache holds sums of {counts.tolist()} tokens where the batch has "
                f"{lengths.tolist()}"
            )
        return onto(sums, targets.target_ids.device)


def _found(rows: np.ndarray, store: Store, folder: Path) -> np.ndarray:
    if missing := int((rows < 0).sum()):
        raise StaleCacheError(
            f"{folder}: {missing:,} of {len(rows):,} completions are not in the cache; run "
            "`logratio precompute` with the same --model, --data and limits, or give --precompute, "
            f"to add them{dates.miss(folder, dates.of_store(store))}"
        )
    return rows


def cached_reference(config: TrainConfig, store: Store) -> CachedReference | CachedSums | None:
    """Open the cache, if there is one, and find every completion in it.

    Raises:
        StaleCacheError: the cache is of another model, or lacks completions.
        DamagedFingerprintError: the fingerprint beside the log-probs was altered.
    """
    if config.cache is None:
        return None
    fingerprint = model_fingerprint(config.reference or config.model, precision_of(config))
    pread = config.read_mode == "pread"
    if holds_sums_only(config.cache, fingerprint):
        reader = open_cache(config.cache, fingerprint, sums=True, pread=pread)
        return CachedSums(store, reader, sums_folder(config.cache, fingerprint))
    reader = open_cache(config.cache, fingerprint, pread=pread)
    return CachedReference(store, reader, cache_folder(config.cache, fingerprint))


def check_possible(logps: np.ndarray, store: Store, layout: Layout) -> None:
    """Refuse log-probs, float32 `[S]`, that no model can mean, before they are written.

    Raises:
        ImpossibleLogpError: one is not finite (E602) or above 0 (E603); names the record.
    """
    if bool((logps <= HIGHEST).all() and np.isfinite(logps).all()):
        return
    first = int(np.flatnonzero(~((logps <= HIGHEST) & np.isfinite(logps)))[0])
    completion = int(np.searchsorted(layout.completion_offsets, first, side="right")) - 1
    row = int(layout.completions[completion])
    group = int(np.searchsorted(store.completion_offsets(), row, side="right")) - 1
    (place,) = source_names(store, [group])
    code = "E603" if np.isfinite(logps[first]) else "E602"
    raise ImpossibleLogpError(
        f"{place}: [{code}] the reference's log-prob of a token is {logps[first]}; nothing of its "
        "batch was written"
    )
