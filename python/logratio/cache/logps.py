"""Read the log-probs of one reference by key or by row."""

import numpy as np
from numpy.typing import NDArray

from logratio._rust import CacheReader
from logratio.cache.identity import StoredReference
from logratio.errors import LogratioError
from logratio.forecast import count


class MissingCompletionsError(LogratioError, LookupError):
    """The cache lacks some of the requested completions."""


def open_reader(reference: StoredReference, *, pread: bool = False) -> CacheReader:
    """Open the Rust reader of a reference's folder; raises the errors of `ReferenceLogps`."""
    return CacheReader.open(
        reference.path,
        reference.digest,
        sums=reference.keeps_sums,
        pread=pread,
        tolerance=reference.tolerance,
    )


class ReferenceLogps:
    """The log-probs of one reference, in nats: a snapshot of its folder when it was opened.

    A key is 32 bytes. `Store.keys()` returns the keys of all completions of a dataset, and
    `content_key` computes one from token ids. A folder of sums has the keys of `Store.sum_keys()`.

    Attributes:
        reference: The reference.

    Example:
        >>> reference = ReferenceCache("cache").open()
        >>> offsets, logps = reference.logps(store.keys())
    """

    def __init__(self, reference: StoredReference, *, pread: bool = False) -> None:
        """Open a reference's folder, which others may be writing to.

        Args:
            reference: One of `ReferenceCache.references()`.
            pread: Read with `pread` instead of a memory map, for network file systems: a file
                truncated while it is read then raises an error instead of crashing the process.

        Raises:
            CorruptCacheError: A journal or the metadata of a shard is damaged.
        """
        self.reference = reference
        self._reader = open_reader(reference, pread=pread)

    def __repr__(self) -> str:
        name, kind = self.reference.name, self.reference.kind
        records, tokens = count(len(self), "record"), count(self.tokens, "token")
        return f"ReferenceLogps({name!r}, {kind}, {records}, {tokens})"

    def __len__(self) -> int:
        """Return the number of records, including repeated ones of the same completion."""
        return len(self._reader)

    @property
    def tokens(self) -> int:
        """Number of tokens of all records."""
        return self._reader.tokens

    def join(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Look up keys.

        Args:
            keys: Keys, uint8 `[n, 32]`.

        Returns:
            The row of each key, int64 `[n]`; -1 if it is missing.

        Raises:
            CorruptCacheError: Two records of one key contradict each other.
        """
        return self._reader.join(keys)

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read per-token log-probs by row; fast enough for every training step.

        Args:
            rows: Rows, int64 `[n]`, as returned by `join`.

        Returns:
            offsets: int64 `[n + 1]`: row i has `logps[offsets[i]:offsets[i + 1]]`.
            logps: float32 `[total]`, one value per completion token, in nats.

        Raises:
            IndexError: A row is -1 or too large.
            ValueError: The folder contains only sums.
            CorruptCacheError: A block, checked on first read, is damaged.
        """
        return self._reader.read(rows)

    def read_sums(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
        """Read token counts and sums of log-probs by row.

        In a folder of per-token log-probs they cover all tokens of a completion; in a folder of
        sums, only its loss tokens.

        Args:
            rows: Rows, int64 `[n]`, as returned by `join`.

        Returns:
            counts: Number of tokens, uint32 `[n]`.
            sums: Sums of their log-probs in nats, float64 `[n]`.
        """
        return self._reader.read_sums(rows)

    def logps(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read per-token log-probs by key, `[n, 32]`; see `read`.

        Raises:
            MissingCompletionsError: A key is not in the cache.
        """
        return self.read(self._rows(keys))

    def sums(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
        """Read sums by key, `[n, 32]`; see `read_sums`.

        Raises:
            MissingCompletionsError: A key is not in the cache.
        """
        return self.read_sums(self._rows(keys))

    def _rows(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        rows = self.join(keys)
        if missing := int((rows < 0).sum()):
            raise MissingCompletionsError(
                f"{self.reference.path}: {missing:,} of {len(rows):,} completions are not in the "
                "cache; `logratio precompute` adds them"
            )
        return rows
