"""Score groups with the reference in memory, and append the log-probs to a cache journal."""

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
from logratio.data.analysis.token_use import BatchSharing
from logratio.data.feed import lay_out, prefetch
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
"""Maximum size of a journal, after which it is sealed and a new one is started."""


class Journals:
    """Appends durable blocks; a full journal becomes a sealed shard."""

    def __init__(self, begin: Callable[[], CacheWriter], most: int = JOURNAL_BYTES) -> None:
        self._begin, self._most = begin, most
        self._writer = begin()
        self._sealed_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes written so far to all journals."""
        return self._sealed_bytes + self._writer.file_bytes

    def append(self, write: Callable[[CacheWriter], None]) -> None:
        """Append a block by calling `write` with the writer; it is durable on return.

        Raises:
            OSError: The disk is full; earlier blocks are in the cache.
        """
        write(self._writer)
        if self._writer.file_bytes >= self._most:
            self._sealed_bytes += self._writer.file_bytes
            self._writer.seal()
            self._writer = self._begin()

    def seal(self) -> None:
        """Turn the last journal into a sealed shard; nothing can be appended afterwards."""
        self._writer.seal()

    def close(self) -> None:
        """Close the last journal, sealed or not."""
        self._writer.close()


BLOCK_TOKENS = 2**16
"""Log-probs per durable block: 256 kB, so a crash loses at most a few seconds of work."""
KEY_BYTES = 32


class Entries(Protocol):
    """A kind of cache entries: log-probs of tokens, or sums of completions."""

    def folder(self, root: str | Path, fingerprint: Fingerprint) -> Path:
        """Return the folder of these entries of a reference in the cache at `root`."""
        ...

    def keys(self, store: Store) -> np.ndarray:
        """Return the key of each completion, uint8 `[N, 32]`."""
        ...

    def nbytes(self, completions: int, tokens: int) -> int:
        """Return the size of entries on disk, in bytes."""
        ...

    def reader(self, folder: Path, fingerprint: Fingerprint, *, pread: bool = False) -> CacheReader:
        """Open a folder of these entries for reading."""
        ...

    def writer(self, folder: Path, fingerprint: Fingerprint) -> CacheWriter:
        """Create a journal of these entries."""
        ...

    def append(
        self, writer: CacheWriter, keys: np.ndarray, taken: list["ScoredCompletions"]
    ) -> None:
        """Write a durable block."""
        ...


class ScoredCompletions:
    """A copy of the wanted completions of one batch.

    Attributes:
        rows: Rows in the store, int64 `[n]`.
        lengths: Number of tokens of each completion, int64 `[n]`.
        logps: Concatenated log-probs, float32 `[sum(lengths)]`.
        counted: Whether each token counts, bool `[sum(lengths)]`.
    """

    def __init__(self, arrays: Layout, logps: np.ndarray, wanted: np.ndarray) -> None:
        keep = wanted[arrays.completions]
        tokens = np.repeat(keep, arrays.completion_lengths)
        self.rows, self.lengths = arrays.completions[keep], arrays.completion_lengths[keep]
        self.logps, self.counted = logps[tokens], arrays.completion_mask[tokens]


class TokenEntries:
    """Entries with the log-prob of every token, float32."""

    def folder(self, root: str | Path, fingerprint: Fingerprint) -> Path:
        """Return `<root>/<fingerprint>`."""
        return cache_folder(root, fingerprint)

    def keys(self, store: Store) -> np.ndarray:
        """Return hashes of the token ids and the start of scoring."""
        return store.keys()

    def nbytes(self, completions: int, tokens: int) -> int:
        """Return 4 bytes per token, plus key and length of each completion."""
        return 4 * tokens + (KEY_BYTES + 4) * completions

    def reader(self, folder: Path, fingerprint: Fingerprint, *, pread: bool = False) -> CacheReader:
        """Open a folder of such entries."""
        return open_folder(folder, fingerprint, pread=pread)

    def writer(self, folder: Path, fingerprint: Fingerprint) -> CacheWriter:
        """Open a journal of such entries."""
        return CacheWriter(folder, fingerprint.digest)

    def append(self, writer: CacheWriter, keys: np.ndarray, taken: list[ScoredCompletions]) -> None:
        """Write a durable block."""
        lengths = np.concatenate([part.lengths for part in taken])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        writer.append(keys, offsets, np.concatenate([part.logps for part in taken]))


class SumEntries:
    """Entries with one float64 sum over the counted tokens: 44 bytes per completion."""

    def folder(self, root: str | Path, fingerprint: Fingerprint) -> Path:
        """Return `<root>/<fingerprint>.sums`."""
        return sums_folder(root, fingerprint)

    def keys(self, store: Store) -> np.ndarray:
        """Return hashes of the token ids, the start of scoring and the mask of counted tokens."""
        return store.sum_keys()

    def nbytes(self, completions: int, tokens: int) -> int:
        """Return the size of a key, a count and a sum for each completion."""
        return (KEY_BYTES + 4 + 8) * completions

    def reader(self, folder: Path, fingerprint: Fingerprint, *, pread: bool = False) -> CacheReader:
        """Open a folder of such entries."""
        return open_folder(folder, fingerprint, sums=True, pread=pread)

    def writer(self, folder: Path, fingerprint: Fingerprint) -> CacheWriter:
        """Open a journal of such entries."""
        return CacheWriter(folder, fingerprint.digest, sums=True)

    def append(self, writer: CacheWriter, keys: np.ndarray, taken: list[ScoredCompletions]) -> None:
        """Write a durable block."""
        counts, sums = zip(*(counted_sums(part) for part in taken), strict=True)
        writer.append_sums(keys, np.concatenate(counts), np.concatenate(sums))


def counted_sums(taken: ScoredCompletions) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts (uint32 `[n]`) and sums (float64 `[n]`) of counted tokens."""
    owners = np.repeat(np.arange(len(taken.rows)), taken.lengths)[taken.counted]
    size = len(taken.rows)
    counts = np.bincount(owners, minlength=size).astype(np.uint32)
    # bincount converts its weights to float64 before adding.
    return counts, np.bincount(owners, taken.logps[taken.counted], size)


def entries_of(sums_only: bool) -> Entries:
    """Return the kind of entries for the setting `sums_only`."""
    return SumEntries() if sums_only else TokenEntries()


@dataclass(frozen=True)
class Work:
    """The completions to score, and the cache folder for their log-probs.

    Attributes:
        store: The tokenized groups.
        keys: Keys of all completions in the store, uint8 `[N, 32]`.
        rows: Rows of the completions to score, int64.
        folder: Cache folder of the reference and kind of entries.
        fingerprint: Fingerprint of the reference.
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
        """The groups with a completion to score, int64, ascending."""
        return np.unique(owners(self.store, self.rows))

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of the completions to score."""
        return int(self.store.completion_lengths()[self.rows].sum())


def owners(store: Store, rows: np.ndarray) -> np.ndarray:
    """Return the group of each completion row, int64."""
    return np.searchsorted(store.completion_offsets(), rows, side="right") - 1


class Block:
    """Collects scored completions into blocks and writes each block durably.

    Attributes:
        completions, tokens: Totals added so far, durable or not.
    """

    def __init__(self, entries: Entries, journals: Journals, keys: np.ndarray) -> None:
        self._entries, self._journals, self._keys = entries, journals, keys
        self._taken: list[ScoredCompletions] = []
        self._pending = self.completions = self.tokens = 0

    def add(self, taken: ScoredCompletions) -> int:
        """Add the completions of a batch; return their number of tokens."""
        self._taken.append(taken)
        self.completions += len(taken.rows)
        self.tokens += len(taken.logps)
        self._pending += len(taken.logps)
        if self._pending >= BLOCK_TOKENS:
            self.flush()
        return len(taken.logps)

    def flush(self) -> None:
        """Write all pending completions durably."""
        rows = np.concatenate([part.rows for part in self._taken] or [np.empty(0, np.int64)])
        if len(rows):
            self._journals.append(partial(self._append, keys=self._keys[rows]))
        self._taken, self._pending = [], 0

    def _append(self, writer: CacheWriter, keys: np.ndarray) -> None:
        self._entries.append(writer, keys, self._taken)


def write_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Write the fingerprint as JSON, atomically, unless the folder already has one."""
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
    """Return the subset of `rows`, int64, whose keys are not in the cache in `folder`.

    Raises:
        CorruptCacheError: A journal was altered.
    """
    if not folder.is_dir():
        return rows
    return rows[entries.reader(folder, fingerprint, pread=pread).join(keys[rows]) < 0]


def first_rows(keys: np.ndarray) -> np.ndarray:
    """Return the first row of each distinct key of `keys`, uint8 `[N, 32]`: int64, ascending."""
    heads = np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
    order = np.argsort(heads, kind="stable")
    same = heads[order][1:] == heads[order][:-1]
    # Comparing the first 64 bits is fast; only keys that agree in them are compared in full.
    alike = np.zeros(len(keys), dtype=bool)
    alike[order[1:][same]] = alike[order[:-1][same]] = True
    _, index = np.unique(keys[alike], axis=0, return_index=True)
    first = ~alike
    first[np.flatnonzero(alike)[index]] = True
    return np.flatnonzero(first)


class ReferenceScorer:
    """Scores groups with a model, and writes the log-probs to a journal.

    Log-probs are written durably in blocks; `flush` writes the last, incomplete block.

    Attributes:
        block: The block that is being filled.
        layout: Batch layout, "tree", "shared" or "padded": the best that the model supports.
        budget: Number of tokens computed at a time, adapted to the memory.
    """

    def __init__(
        self,
        config: PrecomputeConfig,
        work: Work,
        device: torch.device,
        report: Callable[[str], None] = say,
    ) -> None:
        """Load the model `config.model` onto `device`, and create a journal.

        Args:
            config: Settings of the pass.
            work: The completions to score.
            device: Device of the model.
            report: Receives notes for the user.

        Raises:
            UnsupportedModelError: The model's log-probs cannot be computed correctly.
            UntrustedReferenceError: Existing entries of the cache differ from the model's
                log-probs.
        """
        entries = entries_of(config.sums_only)
        self.store, self.wanted, self.device = work.store, work.wanted, device
        self._precision, self._report = precision_of(config), report
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
        if note := layout_note(self.layout, reason, share_beginnings=wanted):
            report(note)
        self.budget = token_budget(config.token_budget, config.model, device)
        if self.layout == "tree":
            report(BatchSharing.of_pass(self.store, work.groups, self.budget.tokens).to_text())
        self._buffers = buffers_for(device)
        self._check_hits(work, config.sums_only)
        record_conditions(work.folder, conditions(self.model, self.layout))
        self._journals = Journals(lambda: entries.writer(work.folder, work.fingerprint))
        self.block = Block(entries, self._journals, work.keys)

    def _check_hits(self, work: Work, sums: bool) -> None:
        reader = entries_of(sums).reader(work.folder, work.fingerprint, pread=self._pread)
        note = check_hits(
            self.model, self.store, reader, work.folder, self.layout, self._precision, sums=sums
        )
        if note:
            self._report(note)

    def score(self, groups: np.ndarray) -> Iterator[int]:
        """Score `groups`, int64, longest first; yield the number of tokens after each batch.

        If a batch does not fit in memory, the token budget is halved and the batch scored again.

        Raises:
            MemoryShortageError: A single group does not fit; earlier scores are durable.
        """
        queue = GroupQueue(self.store, groups, self.layout)
        while len(queue):
            yield from self._score_until_out_of_memory(queue)

    def flush(self) -> None:
        """Write all pending log-probs durably."""
        self.block.flush()

    def seal(self) -> None:
        """Turn the journal into a sealed shard, which opens faster; scoring ends here."""
        self.flush()
        self._journals.seal()

    def close(self) -> None:
        """Close the journal, sealed or not."""
        self._journals.close()

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._journals.nbytes

    def _score_until_out_of_memory(self, queue: GroupQueue) -> Iterator[int]:
        done = queue.position
        with closing(prefetch(self._batches(queue))) as batches:
            for arrays in batches:
                logps = self._try(arrays)
                if logps is None:
                    break
                done += len(arrays.groups)
                yield self.block.add(ScoredCompletions(arrays, logps, self.wanted))
        queue.position = done  # prefetched batches that were not scored return to the queue

    def _batches(self, queue: GroupQueue) -> Iterator[Layout]:
        """Yield batches of the queue's groups."""
        shape = shape_for(self.layout, self.device)
        while len(queue):
            groups = queue.take(self.budget.tokens)
            yield lay_out(self.store, groups, self.layout, arena=self._buffers, **shape)

    def _try(self, arrays: Layout) -> np.ndarray | None:
        """Return the log-probs of a batch, or None if it does not fit in memory."""
        try:
            logps = self._logps(arrays)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.budget.fitted(arrays.input_ids.size)
            return logps
        self._shrink(arrays)  # outside of the handler, whose error keeps tensors alive
        return None

    @torch.no_grad()
    def _logps(self, arrays: Layout) -> np.ndarray:
        """Return the log-probs of a batch's completions, float32 `[S]`.

        Raises:
            ImpossibleLogpError: One is not finite or above 0; the message names the record.
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
                f"out of memory on {self.device} with a single group ({place}, {tokens:,} tokens): "
                "lower --max-length, or use --precision bf16 or a larger device; completed scores "
                "are in the cache"
            )
        self.budget.exceeded(tokens)
        self._report(
            f"out of memory at {tokens:,} tokens at a time: retrying with {self.budget.tokens:,}; "
            "no scores are lost"
        )
