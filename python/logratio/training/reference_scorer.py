"""The reference in memory, scoring groups into a journal of the cache."""

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch

from logratio.cache.conditions import record_conditions
from logratio.data import ahead, lay_out, source_names
from logratio.logps.checks import choose_layout, layout_note
from logratio.logps.completion import score
from logratio.logps.tensors import Layout, buffers_for, shape_for, to_torch
from logratio.progress import say
from logratio.training.budget import (
    GroupQueue,
    MemoryShortageError,
    is_out_of_memory,
    token_budget,
)
from logratio.training.cache_entries import Block, Taken, Work, entries_of
from logratio.training.cached import check_possible
from logratio.training.config import PrecomputeConfig
from logratio.training.journals import Journals
from logratio.training.models import autocast, load_model, precision_of
from logratio.training.trust import check_hits, conditions


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
