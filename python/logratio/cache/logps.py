"""The log-probs of one reference, by key or by row."""

import numpy as np
from numpy.typing import NDArray

from logratio._rust import CacheReader
from logratio.cache.identity import StoredReference
from logratio.errors import LogratioError


class MissingCompletionsError(LogratioError, LookupError):
    """The cache lacks completions that were asked for."""


def open_reader(reference: StoredReference, *, pread: bool = False) -> CacheReader:
    """Open a reference's folder as the core does; raises what `ReferenceLogps` does."""
    return CacheReader.open(
        reference.path,
        reference.digest,
        sums=reference.keeps_sums,
        pread=pread,
        tolerance=reference.tolerance,
    )


class ReferenceLogps:
    """What one reference says of completions, as its folder stood when it was opened.

    A key is 32 bytes: `Store.keys()` has them for every completion of a data set, `content_key`
    makes one from token ids; a folder of sums has those of `Store.sum_keys()`. Natural logarithms.

    Attributes:
        reference: whose log-probs they are.
    """

    def __init__(self, reference: StoredReference, *, pread: bool = False) -> None:
        """Open a reference's folder; writers may be at work in it.

        Args:
            reference: Of `ReferenceCache.references()`.
            pread: Read by calls to the system instead of a memory map: a file that somebody cuts
                meanwhile is then an error. For network file systems.

        Raises:
            CorruptCacheError: A journal or the seal of a shard is damaged.
        """
        self.reference = reference
        self._reader = open_reader(reference, pread=pread)

    def __len__(self) -> int:
        """Return the number of records, those that repeat a completion included."""
        return len(self._reader)

    @property
    def tokens(self) -> int:
        """Number of tokens of all records."""
        return self._reader.tokens

    def join(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the row of each key, int64 `[n]`; -1 where it is missing.

        Args:
            keys: uint8 `[n, 32]`.

        Raises:
            CorruptCacheError: Two records of one key contradict each other.
        """
        return self._reader.join(keys)

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read log-probs by row, as often as a training step needs them.

        Args:
            rows: int64 `[n]`, of `join`.

        Returns:
            offsets: int64 `[n + 1]`: row i has `logps[offsets[i]:offsets[i + 1]]`.
            logps: float32, one for each completion token.

        Raises:
            IndexError: A row is -1 or beyond the last.
            ValueError: The folder keeps sums only.
            CorruptCacheError: A block that is read for the first time is damaged.
        """
        return self._reader.read(rows)

    def read_sums(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
        """Read token counts, uint32 `[n]`, and sums over those tokens, float64 `[n]`, by row.

        Those of a folder of log-probs are over all tokens of a completion; those of a folder of
        sums over the tokens that count.
        """
        return self._reader.read_sums(rows)

    def logps(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read log-probs by key; returns what `read` does.

        Raises:
            MissingCompletionsError: A key is not in the cache.
        """
        return self.read(self._rows(keys))

    def sums(self, keys: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
        """Read sums by key; returns what `read_sums` does.

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
