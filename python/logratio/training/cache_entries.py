"""What a cache keeps of a completion, every token or their sum, and how it is made durable."""

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from logratio._rust import CacheReader, CacheWriter, Store
from logratio.cache.identity import FINGERPRINT_FILE
from logratio.durable import write_whole
from logratio.logps.tensors import Layout
from logratio.training.fingerprint import Fingerprint
from logratio.training.journals import Journals
from logratio.training.reference import cache_folder, open_folder, sums_folder

BLOCK_TOKENS = 2**16
"""Log-probs made durable together: 256 kB, at most a few seconds of work to lose."""
KEY_BYTES = 32


class Entries(Protocol):
    """One kind of cache."""

    def folder(self, root: str | Path, fingerprint: Fingerprint) -> Path:
        """Return where this kind of entries of one reference lies below a cache's root."""
        ...

    def keys(self, store: Store) -> np.ndarray:
        """Return what names each completion, uint8 `[N, 32]`."""
        ...

    def nbytes(self, completions: int, tokens: int) -> int:
        """Count the bytes that they take on the disk."""
        ...

    def reader(self, folder: Path, fingerprint: Fingerprint, *, pread: bool = False) -> CacheReader:
        """Open a folder of such entries."""
        ...

    def writer(self, folder: Path, fingerprint: Fingerprint) -> CacheWriter:
        """Open a journal of such entries."""
        ...

    def append(self, writer: CacheWriter, keys: np.ndarray, taken: list["Taken"]) -> None:
        """Write a durable block."""
        ...


class Taken:
    """The completions that are wanted of one batch, copied out of it.

    Attributes:
        rows: int64 `[n]`, in the store.
        lengths: int64 `[n]`, tokens of each.
        logps: float32, flat.
        counted: bool, flat: tokens that count.
    """

    def __init__(self, arrays: Layout, logps: np.ndarray, wanted: np.ndarray) -> None:
        keep = wanted[arrays.completions]
        tokens = np.repeat(keep, arrays.completion_lengths)
        self.rows, self.lengths = arrays.completions[keep], arrays.completion_lengths[keep]
        self.logps, self.counted = logps[tokens], arrays.completion_mask[tokens]


class TokenEntries:
    """The log-prob of every token, float32: every loss can read them."""

    def folder(self, root: str | Path, fingerprint: Fingerprint) -> Path:
        """Return `<root>/<fingerprint>`."""
        return cache_folder(root, fingerprint)

    def keys(self, store: Store) -> np.ndarray:
        """Return hashes of the ids and of where scoring starts."""
        return store.keys()

    def nbytes(self, completions: int, tokens: int) -> int:
        """Count 4 bytes a token, the key and the length."""
        return 4 * tokens + (KEY_BYTES + 4) * completions

    def reader(self, folder: Path, fingerprint: Fingerprint, *, pread: bool = False) -> CacheReader:
        """Open a folder of such entries."""
        return open_folder(folder, fingerprint, pread=pread)

    def writer(self, folder: Path, fingerprint: Fingerprint) -> CacheWriter:
        """Open a journal of such entries."""
        return CacheWriter(folder, fingerprint.digest)

    def append(self, writer: CacheWriter, keys: np.ndarray, taken: list[Taken]) -> None:
        """Write a durable block."""
        lengths = np.concatenate([part.lengths for part in taken])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        writer.append(keys, offsets, np.concatenate([part.logps for part in taken]))


class SumEntries:
    """One float64 sum over the tokens that count: 44 bytes a completion, for billions of them."""

    def folder(self, root: str | Path, fingerprint: Fingerprint) -> Path:
        """Return `<root>/<fingerprint>.sums`."""
        return sums_folder(root, fingerprint)

    def keys(self, store: Store) -> np.ndarray:
        """Return hashes of the ids, of where scoring starts and of which tokens count."""
        return store.sum_keys()

    def nbytes(self, completions: int, tokens: int) -> int:
        """Count a key, a count and a sum for each."""
        return (KEY_BYTES + 4 + 8) * completions

    def reader(self, folder: Path, fingerprint: Fingerprint, *, pread: bool = False) -> CacheReader:
        """Open a folder of such entries."""
        return open_folder(folder, fingerprint, sums=True, pread=pread)

    def writer(self, folder: Path, fingerprint: Fingerprint) -> CacheWriter:
        """Open a journal of such entries."""
        return CacheWriter(folder, fingerprint.digest, sums=True)

    def append(self, writer: CacheWriter, keys: np.ndarray, taken: list[Taken]) -> None:
        """Write a durable block."""
        counts, sums = zip(*(counted_sums(part) for part in taken), strict=True)
        writer.append_sums(keys, np.concatenate(counts), np.concatenate(sums))


def counted_sums(taken: Taken) -> tuple[np.ndarray, np.ndarray]:
    """Add up the tokens that count: their numbers uint32 `[n]`, and sums float64 `[n]`."""
    owners = np.repeat(np.arange(len(taken.rows)), taken.lengths)[taken.counted]
    size = len(taken.rows)
    counts = np.bincount(owners, minlength=size).astype(np.uint32)
    # The weights are float64 before the first addition.
    return counts, np.bincount(owners, taken.logps[taken.counted], size)


def entries_of(sums_only: bool) -> Entries:
    """Return the kind that the flag asks for."""
    return SumEntries() if sums_only else TokenEntries()


@dataclass(frozen=True)
class Work:
    """What is to be scored, and where it goes.

    Attributes:
        store: the groups.
        keys: uint8 `[N, 32]`, of all completions of the store.
        rows: int64, completions that are wanted.
        folder: of the cache, of this reference and kind of entries.
        fingerprint: of the reference.
    """

    store: Store
    keys: np.ndarray
    rows: np.ndarray
    folder: Path
    fingerprint: Fingerprint

    @cached_property
    def wanted(self) -> np.ndarray:
        """The rows as a mask: bool `[N]`."""
        mask = np.zeros(len(self.keys), dtype=bool)
        mask[self.rows] = True
        return mask

    @cached_property
    def groups(self) -> np.ndarray:
        """The groups that hold a wanted completion, int64, in order."""
        return np.unique(owners(self.store, self.rows))

    @cached_property
    def tokens(self) -> int:
        """Tokens of the wanted completions."""
        return int(self.store.completion_lengths()[self.rows].sum())


def owners(store: Store, rows: np.ndarray) -> np.ndarray:
    """Return the group of each completion row, int64."""
    return np.searchsorted(store.completion_offsets(), rows, side="right") - 1


class Block:
    """Completions scored but not yet durable.

    Attributes:
        completions, tokens: taken so far, durable or not.
    """

    def __init__(self, entries: Entries, journals: Journals, keys: np.ndarray) -> None:
        self._entries, self._journals, self._keys = entries, journals, keys
        self._taken: list[Taken] = []
        self._pending = self.completions = self.tokens = 0

    def add(self, taken: Taken) -> int:
        """Take the completions of a batch; return how many tokens they have."""
        self._taken.append(taken)
        self.completions += len(taken.rows)
        self.tokens += len(taken.logps)
        self._pending += len(taken.logps)
        if self._pending >= BLOCK_TOKENS:
            self.flush()
        return len(taken.logps)

    def flush(self) -> None:
        """Make everything taken so far durable."""
        rows = np.concatenate([part.rows for part in self._taken] or [np.empty(0, np.int64)])
        if len(rows):
            self._journals.append(partial(self._append, keys=self._keys[rows]))
        self._taken, self._pending = [], 0

    def _append(self, writer: CacheWriter, keys: np.ndarray) -> None:
        self._entries.append(writer, keys, self._taken)


def write_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Store the readable fingerprint, whole or not at all."""
    path = folder / FINGERPRINT_FILE
    if not path.exists():
        write_whole(path, json.dumps(fingerprint.to_dict(), indent=1))


def missing_rows(
    entries: Entries,
    keys: np.ndarray,
    rows: np.ndarray,
    folder: Path,
    fingerprint: Fingerprint,
    *,
    pread: bool = False,
) -> np.ndarray:
    """Return those of `rows`, int64, whose keys the cache in `folder` lacks.

    Raises:
        CorruptCacheError: a journal was altered.
    """
    if not folder.is_dir():
        return rows
    return rows[entries.reader(folder, fingerprint, pread=pread).join(keys[rows]) < 0]


def first_rows(keys: np.ndarray) -> np.ndarray:
    """Return the first row of each different key, uint8 `[N, 32]`, in order: int64."""
    heads = np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
    order = np.argsort(heads, kind="stable")
    same = heads[order][1:] == heads[order][:-1]
    # Keys whose first 64 bits differ are different; only the few others are compared whole.
    alike = np.zeros(len(keys), dtype=bool)
    alike[order[1:][same]] = alike[order[:-1][same]] = True
    _, index = np.unique(keys[alike], axis=0, return_index=True)
    first = ~alike
    first[np.flatnonzero(alike)[index]] = True
    return np.flatnonzero(first)
