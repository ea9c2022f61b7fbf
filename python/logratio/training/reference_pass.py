"""The reference's log-probs, once, into a cache that any number of runs can read."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from logratio._rust import CacheWriter, PaddedLayout, SharedLayout
from logratio.data import ahead, lay_out, micro_batches
from logratio.forecast import Forecast, check_writable
from logratio.progress import progress
from logratio.training import demand, threads
from logratio.training.cached import check_possible
from logratio.training.checks import choose_layout
from logratio.training.config import PrecomputeConfig
from logratio.training.fingerprint import model_fingerprint
from logratio.training.interrupt import RunInterruptedError, interrupts
from logratio.training.loop import say
from logratio.training.models import autocast, check_model_folder, default_device, load_model
from logratio.training.reference import cache_folder, missing_rows, record_fingerprint, score
from logratio.training.setup import Dataset, load_dataset
from logratio.training.tensors import buffers_for, to_torch
from logratio.training.trust import check_hits, conditions

Layout = SharedLayout | PaddedLayout

BLOCK_TOKENS = 2**16
"""Log-probs made durable together: 256 kB, at most a few seconds of work to lose."""


@dataclass(frozen=True)
class PrecomputeResult:
    """What a pass did.

    Attributes:
        folder: where this reference's log-probs lie.
        new, hits: completions scored now, and found in the cache.
        tokens: log-probs written now.
    """

    folder: Path
    new: int
    hits: int
    tokens: int


def precompute(config: PrecomputeConfig, *, show_progress: bool = True) -> PrecomputeResult:
    """Fill the cache with the log-probs of every completion in the data that it lacks.

    Every block is durable before the next is begun: a pass that was killed goes on where it was.

    Raises:
        ModelFolderError, OutputError, BadDataError: before anything long.
        RunInterruptedError: after Ctrl-C or SIGTERM; what was scored is in the cache.
        OSError: the disk is full; what was acknowledged is in the cache.
    """
    return prepare(config, show_progress=show_progress).run()


def prepare(config: PrecomputeConfig, *, show_progress: bool = True) -> "Precompute":
    """Check the folders and tokenize the data; nothing long has started."""
    default_device(config.device)
    check_model_folder(Path(config.model))
    check_writable(Path(config.cache))
    dataset = load_dataset(
        config.model,
        config.data,
        config.rules,
        config.formats,
        max_bad_fraction=config.max_bad_fraction,
        show_progress=show_progress,
    )
    return Precompute(config, dataset, show_progress)


class Precompute:
    """A pass that is ready to start."""

    def __init__(self, config: PrecomputeConfig, dataset: Dataset, show_progress: bool) -> None:
        self.config, self.dataset, self.show_progress = config, dataset, show_progress
        self.store = dataset.store
        self.fingerprint = model_fingerprint(config.model, config.precision)

    @cached_property
    def missing(self) -> np.ndarray:
        """Rows of the completions that the cache lacks, int64."""
        return missing_rows(self.store, self.config.cache, self.fingerprint)

    @cached_property
    def forecast(self) -> Forecast:
        """What the pass will need."""
        tokens = int(self.store.completion_lengths()[self.missing].sum())
        groups = self._groups_to_score()
        read = float(self.store.shared_lengths()[groups].sum())
        device = self.config.device
        return Forecast(
            memory_bytes=demand.scoring_bytes(
                [self.config.model], min(self.config.token_budget, int(read))
            ),
            disk_bytes=tokens * 4 + len(self.missing) * 36,
            disk_path=Path(self.config.cache),
            seconds=demand.seconds(self.config.model, read, demand.FORWARD, device),
            notes=f"{len(self.missing):,} completions to score, {tokens:,} tokens",
        )

    def run(self) -> PrecomputeResult:
        """Score what is missing; a pass with nothing to score loads no model."""
        folder = cache_folder(self.config.cache, self.fingerprint)
        missing = self.missing
        tokens = self._score(folder) if len(missing) else 0
        return PrecomputeResult(folder, len(missing), self.store.completions - len(missing), tokens)

    def _score(self, folder: Path) -> int:
        device = default_device(self.config.device)
        check_writable(folder, self.forecast.disk_bytes)
        if slow := threads.advice(device):
            say(slow)
        model = load_model(self.config.model, device=device).requires_grad_(False)
        writer = CacheWriter(folder, self.fingerprint.digest)
        try:
            with torch.no_grad(), autocast(self.config.precision, device):
                return self._fill(model, writer)
        finally:
            writer.close()

    def _fill(self, model: nn.Module, writer: CacheWriter) -> int:
        layout, reason = choose_layout(model)
        if layout == "padded":
            say(f"padded layout (slower, never wrong): {reason}")
        known = self.fingerprint.made_with(**conditions(model, layout))
        if told := check_hits(
            model, self.store, self.config.cache, known, layout, self.config.precision
        ):
            say(told)
        record_fingerprint(cache_folder(self.config.cache, known), known)
        block = _Block(writer, self.store.keys(), self.missing)
        total = int(self.store.completion_lengths()[self.missing].sum())
        with (
            closing(ahead(self._batches(layout, next(model.parameters()).device))) as batches,
            interrupts() as interrupted,
            progress("scoring", total, "tokens", show=self.show_progress) as advance,
        ):
            for arrays in batches:
                advance(block.add(*self._logps(model, arrays)))
                if signal := interrupted():
                    block.flush()
                    raise RunInterruptedError(
                        signal, "what was scored is in the cache; run again to go on"
                    )
            block.flush()
        return block.tokens

    def _batches(self, layout: str, device: torch.device) -> Iterator[Layout]:
        """Yield the groups to score, laid out."""
        buffers = buffers_for(device)
        for groups in self._micro_batches(layout):
            yield lay_out(self.store, groups, layout, arena=buffers)

    def _logps(self, model: nn.Module, arrays: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows, offsets and log-probs of the groups' completions."""
        logps = score(model, to_torch(arrays, next(model.parameters()).device))
        found = logps.float().cpu().numpy()
        check_possible(found, self.store, arrays)
        return arrays.completions, arrays.completion_offsets, found

    def _groups_to_score(self) -> np.ndarray:
        """Return the groups with a missing completion."""
        owners = np.searchsorted(self.store.completion_offsets(), self.missing, side="right") - 1
        return np.unique(owners)

    def _micro_batches(self, layout: str) -> Iterator[np.ndarray]:
        plan = self.store.plan(
            order="sorted",
            groups_per_update=len(self.store),
            token_budget=self.config.token_budget,
            layout=layout,
        )
        wanted = np.zeros(len(self.store), dtype=bool)
        wanted[self._groups_to_score()] = True
        for groups in micro_batches(plan):
            if len(kept := groups[wanted[groups]]):
                yield kept


class _Block:
    """Completions scored but not yet durable."""

    def __init__(self, writer: CacheWriter, keys: np.ndarray, missing: np.ndarray) -> None:
        self.writer, self.keys = writer, keys
        self.wanted = np.zeros(len(keys), dtype=bool)
        self.wanted[missing] = True
        self.rows: list[int] = []
        self.parts: list[np.ndarray] = []
        self.pending = self.tokens = 0

    def add(self, rows: np.ndarray, offsets: np.ndarray, logps: np.ndarray) -> int:
        """Take the wanted completions of a batch; return how many tokens they have."""
        before = self.tokens
        for index, row in enumerate(rows):
            if not self.wanted[row]:
                continue
            part = logps[offsets[index] : offsets[index + 1]]
            self.rows.append(int(row))
            self.parts.append(part)
            self.tokens += len(part)
            self.pending += len(part)
        if self.pending >= BLOCK_TOKENS:
            self.flush()
        return self.tokens - before

    def flush(self) -> None:
        """Make everything taken so far durable."""
        if not self.rows:
            return
        lengths = np.array([len(part) for part in self.parts], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.writer.append(self.keys[self.rows], offsets, np.concatenate(self.parts))
        self.rows, self.parts, self.pending = [], [], 0
