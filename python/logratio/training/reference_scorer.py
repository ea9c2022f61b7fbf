"""The reference in memory, scoring groups into a journal of the cache."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from logratio._rust import CacheReader, CacheWriter, Store
from logratio.cache.identity import FINGERPRINT_FILE, record_conditions
from logratio.data.feed import ahead, lay_out
from logratio.data.store.load import source_names
from logratio.durable import write_atomic
from logratio.logps.batch import Layout, buffers_for, shape_for, to_torch
from logratio.logps.checks import choose_layout, layout_note
from logratio.logps.completion import score
from logratio.progress import say
from logratio.training.config import PrecomputeConfig
from logratio.training.fingerprint import Fingerprint
from logratio.training.memory import GroupQueue, MemoryShortageError, is_out_of_memory, token_budget
from logratio.training.models import autocast, load_model, precision_of
from logratio.training.reference import cache_folder, check_possible, open_folder, sums_folder
from logratio.training.reference_checks import check_hits, conditions

JOURNAL_BYTES = 2**30
"""A journal of this size is full: it is sealed, and another one is begun."""


class Journals:
    """Appends durable blocks; a full journal becomes a sealed shard.

    Attributes:
        nbytes: written so far, in all journals.
    """

    def __init__(self, begin: Callable[[], CacheWriter], most: int = JOURNAL_BYTES) -> None:
        self._begin, self._most = begin, most
        self._writer = begin()
        self._sealed_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes written so far, in all journals."""
        return self._sealed_bytes + self._writer.file_bytes

    def append(self, write: Callable[[CacheWriter], None]) -> None:
        """Let `write` append a block, which is durable when this returns or raises nothing.

        Raises:
            OSError: the disk is full; what was acknowledged is in the cache.
        """
        write(self._writer)
        if self._writer.file_bytes >= self._most:
            self._sealed_bytes += self._writer.file_bytes
            self._writer.seal()
            self._writer = self._begin()

    def seal(self) -> None:
        """Make the last journal a sealed shard; nothing can be appended after."""
        self._writer.seal()

    def close(self) -> None:
        """Let go of the last journal, sealed or not."""
        self._writer.close()


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
        write_atomic(path, json.dumps(fingerprint.to_dict(), indent=1))


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


class ReferenceScorer:
    """A model and a journal. What is scored is durable after `flush`, or block by block.

    Attributes:
        block: what was scored, and what of it is not durable yet.
        layout: "tree", "shared" or "padded", as is asked for and the leak check allows.
        budget: tokens computed at a time; it learns from batches that do not fit.
    """

    def __init__(
        self,
        config: PrecomputeConfig,
        work: Work,
        device: torch.device,
        tell: Callable[[str], None] = say,
    ) -> None:
        """Load the model that `config` names onto `device`, and open a journal.

        `tell` gets a sentence where something is other than one would think.

        Raises:
            UnsupportedModelError: the model's log-probs cannot be computed rightly.
            UntrustedReferenceError: what the cache holds already is not what the model says.
        """
        entries = entries_of(config.sums_only)
        self.store, self.wanted, self.device = work.store, work.wanted, device
        self._precision, self._tell = precision_of(config), tell
        self._pread = config.read_mode == "pread"
        self.model = load_model(
            config.model,
            device=device,
            quantization=config.quantization,
            precision=self._precision,
            frozen=True,
        )
        with autocast(self._precision, device):
            wanted = config.share_beginnings
            self.layout, reason = choose_layout(self.model, share_beginnings=wanted)
        if told := layout_note(self.layout, reason, share_beginnings=wanted):
            tell(told)
        self.budget = token_budget(config.token_budget, config.model, device)
        self._buffers = buffers_for(device)
        self._check_hits(work, config.sums_only)
        record_conditions(work.folder, conditions(self.model, self.layout))
        self._journals = Journals(lambda: entries.writer(work.folder, work.fingerprint))
        self.block = Block(entries, self._journals, work.keys)

    def _check_hits(self, work: Work, sums: bool) -> None:
        reader = entries_of(sums).reader(work.folder, work.fingerprint, pread=self._pread)
        told = check_hits(
            self.model, self.store, reader, work.folder, self.layout, self._precision, sums=sums
        )
        if told:
            self._tell(told)

    def score(self, groups: np.ndarray) -> Iterator[int]:
        """Score `groups`, int64, the longest first; yield after each batch how many tokens it had.

        A batch that does not fit in memory is halved and scored again: nothing is lost.

        Raises:
            MemoryShortageError: one group alone does not fit; what was scored before is durable.
        """
        queue = GroupQueue(self.store, groups, self.layout)
        while len(queue):
            yield from self._until_it_does_not_fit(queue)

    def flush(self) -> None:
        """Make everything scored so far durable."""
        self.block.flush()

    def seal(self) -> None:
        """Make the journal a sealed shard, which opens faster; nothing can be scored after."""
        self.flush()
        self._journals.seal()

    def close(self) -> None:
        """Let go of the journal, sealed or not."""
        self._journals.close()

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._journals.nbytes

    def _until_it_does_not_fit(self, queue: GroupQueue) -> Iterator[int]:
        done = queue.position
        with closing(ahead(self._batches(queue))) as batches:
            for arrays in batches:
                logps = self._try(arrays)
                if logps is None:
                    break
                done += len(arrays.groups)
                yield self.block.add(Taken(arrays, logps, self.wanted))
        queue.position = done  # what was laid out ahead is laid out again

    def _batches(self, queue: GroupQueue) -> Iterator[Layout]:
        """Yield the groups to score, laid out."""
        shape = shape_for(self.layout, self.device)
        while len(queue):
            groups = queue.take(self.budget.tokens)
            yield lay_out(self.store, groups, self.layout, arena=self._buffers, **shape)

    def _try(self, arrays: Layout) -> np.ndarray | None:
        """Return the log-probs of a batch, or None where it does not fit in memory."""
        try:
            logps = self._logps(arrays)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.budget.fitted(arrays.input_ids.size)
            return logps
        self._shrink(arrays)  # out here, where the error holds no tensors any more
        return None

    @torch.no_grad()
    def _logps(self, arrays: Layout) -> np.ndarray:
        """Return float32 `[S]`, the log-probs of a batch's completions.

        Raises:
            ImpossibleLogpError: one is not finite or above 0; names the record.
        """
        with autocast(self._precision, self.device):
            logps: np.ndarray = (
                score(self.model, to_torch(arrays, self.device)).float().cpu().numpy()
            )
        check_possible(logps, self.store, arrays)
        return logps

    def _shrink(self, arrays: Layout) -> None:
        tokens = arrays.input_ids.size
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(arrays.groups) == 1:
            self.flush()
            (place,) = source_names(self.store, arrays.groups.tolist())
            raise MemoryShortageError(
                f"out of memory on {self.device} with one group alone ({place}, {tokens:,} tokens):"
                " lower max_length, or use --precision bf16 or a larger device; what was scored "
                "is in the cache"
            )
        self.budget.exceeded(tokens)
        self._tell(
            f"out of memory at {tokens:,} tokens at a time: going on with {self.budget.tokens:,}, "
            "nothing is lost"
        )
