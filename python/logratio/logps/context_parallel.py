"""Context parallelism: several processes compute the tokens of a prompt together.

Each process has some tokens of a shared row. Everything but attention works on single tokens;
`attention/split.py` lets tokens see those of other processes. The log-probs of all processes are
put together before the loss, so each computes the loss of the whole batch, and its gradient flows
to the process's own tokens only. The gradient of a weight is the sum over all processes, as always.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from logratio.logps.batch import Part, SharedBatch, TargetTokens
from logratio.logps.head import Head, tile_rows
from logratio.logps.head_loss import LossOf, head_logps, head_loss
from logratio.logps.sequences import Bounds, onto

_RANKS = "_logratio_context_ranks"


class ContextRanks:
    """The processes that compute prompts together.

    Attributes:
        rank: Index of this process among them, from 0.
        count: Their number.
        group: Their process group.
    """

    def __init__(self, rank: int, count: int, group: Any) -> None:
        self.rank, self.count, self.group = rank, count, group
        self._tile_rows = dict[int, int]()

    def tile_rows(self, head: Head) -> int:
        """Return `head.tile_rows` of the process with the least; a collective at the first call."""
        vocabulary = len(head.weight)
        if vocabulary not in self._tile_rows:
            rows = torch.tensor(tile_rows(head), device=head.weight.device)
            dist.all_reduce(rows, dist.ReduceOp.MIN, self.group)
            self._tile_rows[vocabulary] = int(rows)
        return self._tile_rows[vocabulary]


@contextmanager
def split_over(ranks: ContextRanks, *models: nn.Module) -> Iterator[None]:
    """Split shared batches of `models` (without peft wrappers) over `ranks` inside the block.

    All of these processes must then compute the same batches at the same time.
    """
    for model in models:
        vars(model)[_RANKS] = ranks
    try:
        yield
    finally:
        for model in models:
            vars(model).pop(_RANKS, None)


def ranks_of(model: nn.Module) -> ContextRanks | None:
    """Return the processes that compute the shared batches of a model together, or None."""
    found: ContextRanks | None = vars(model).get(_RANKS)
    return found


class Run(NamedTuple):
    """Consecutive tokens of a row in one process: a chunk of a prompt, or a completion.

    Attributes:
        start: The first token, in the row.
        length: Number of tokens.
        group: The group of the row.
        seen: Number of tokens of the group's prompt before the run; its tokens see all of them.
    """

    start: int
    length: int
    group: int
    seen: int

    @property
    def tokens(self) -> np.ndarray:
        """The positions of its tokens in the row."""
        return np.arange(self.start, self.start + self.length)


class Division:
    """Which tokens of a shared row each process has.

    A prompt is cut into two chunks per process, of which process r has numbers r and 2R - 1 - r
    (zig-zag), so that all have equal causal work. Each completion is in one process, whole.

    Args:
        prompts: Length of each group's prompt.
        completions: Lengths of each group's completions.
        ranks: Number of processes, R.
    """

    def __init__(
        self, prompts: Sequence[int], completions: Sequence[Sequence[int]], ranks: int
    ) -> None:
        self.prompts, self.completions, self.ranks = prompts, completions, ranks
        sizes = [prompt + sum(own) for prompt, own in zip(prompts, completions, strict=True)]
        self._starts = list(accumulate(sizes, initial=0))

    def chunks(self, rank: int) -> list[Run]:
        """Return a process's chunks of the prompts, in the order of the row."""
        found, pieces = [], 2 * self.ranks
        for group, length in enumerate(self.prompts):
            cuts = [length * n // pieces for n in range(pieces + 1)]
            for n in (rank, pieces - 1 - rank):
                start = self._starts[group] + cuts[n]
                found.append(Run(start, cuts[n + 1] - cuts[n], group, cuts[n]))
        return [run for run in found if run.length]

    def all_completions(self) -> list[Run]:
        """Return all completions of the row, in its order."""
        found = []
        for group, (prompt, lengths) in enumerate(zip(self.prompts, self.completions, strict=True)):
            starts = accumulate(lengths, initial=self._starts[group] + prompt)
            found += [Run(at, n, group, prompt) for at, n in zip(starts, lengths, strict=False)]
        return found

    def own_completions(self, rank: int) -> list[Run]:
        """Return a process's completions: the longest first, each goes to the least loaded one."""
        loads, own = [0] * self.ranks, []
        for run in sorted(self.all_completions(), key=lambda run: -run.length):
            least = loads.index(min(loads))
            loads[least] += run.length
            if least == rank and run.length:
                own.append(run)
        return sorted(own)

    def predicting(self) -> np.ndarray:
        """Return the token of the row that predicts each token of a completion, int64 `[S]`."""
        found = [np.zeros(0, np.int64)]
        for run in self.all_completions():
            places = run.tokens - 1
            if run.length:
                places[0] = self._starts[run.group] + run.seen - 1
            found.append(places)
        return np.concatenate(found)

    def gathered(self) -> tuple[np.ndarray, int]:
        """Return where each token of the prompts is after a gather, int64 `[P]`; and the width.

        Each process gives the tokens of its chunks, padded to the width.
        """
        owners = [self.chunks(rank) for rank in range(self.ranks)]
        width = max(sum(run.length for run in runs) for runs in owners)
        prompts = list(accumulate(self.prompts, initial=0))
        found = np.empty(prompts[-1], np.int64)
        for rank, runs in enumerate(owners):
            at = rank * width
            for run in runs:
                start = prompts[run.group] + run.seen
                found[start : start + run.length] = np.arange(at, at + run.length)
                at += run.length
        return found, width


class PromptCall(NamedTuple):
    """An attention call: some consecutive tokens of this process see a part of a prompt.

    Attributes:
        queries: The tokens, among those of this process.
        keys: The part, among the tokens of all prompts.
        bounds: Bounds of the call's one sequence.
    """

    queries: slice
    keys: slice
    bounds: Bounds


@dataclass(frozen=True)
class SplitBatch:
    """The tokens of a shared batch that this process computes: chunks of prompts, then completions.

    Attributes:
        input_ids: Token ids, int64 `[1, t]`.
        position_ids: Positions, int64 `[1, t]`.
        logit_index: Own token that predicts each own target, int64 `[s]`.
        target_ids: Own targets, in the order of the batch, int64 `[s]`.
        places: Their places among the targets of the batch, on the host, int64 numpy `[s]`.
        targets: The scored tokens of the whole batch.
        ranks: The processes.
        own: Number of tokens that are of prompts.
        order: Where each token of all prompts is after a gather, int64 `[P]`.
        width: Tokens that each process gives to a gather, with padding.
        on_themselves: Bounds of this process's runs: each sees itself.
        on_prompts: The calls for what they see besides.
    """

    input_ids: Tensor
    position_ids: Tensor
    logit_index: Tensor
    target_ids: Tensor
    places: np.ndarray
    targets: TargetTokens
    ranks: ContextRanks
    own: int
    order: Tensor
    width: int
    on_themselves: Bounds
    on_prompts: tuple[PromptCall, ...]

    def whole(self, logps: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Put the log-probs of own targets together with those of other processes; differentiable.

        Args:
            logps: Log-probs of this process's targets in the range, `[s]`.
            start: The first target of the range, in the batch.
            stop: The end of the range; None: of the batch.
        """
        stop = len(self.targets.target_ids) if stop is None else stop
        places = self.places[self._own(start, stop)] - start
        found: Tensor = _Whole.apply(logps, onto(places, logps.device), stop - start, self.ranks)
        return found

    def parts(self, limit: int) -> list[tuple[Part, Part]]:
        """Return the parts of the batch, and the same with the places of own targets only.

        Args:
            limit: As in `TargetTokens.parts`, and the same in all processes.
        """
        found = self.targets.parts(limit)
        at = [self._own(part.targets_at.start, part.targets_at.stop) for part in found]
        return [(part, replace(part, targets_at=own)) for part, own in zip(found, at, strict=True)]

    def _own(self, start: int, stop: int) -> slice:
        """Return which own targets are in a range of the batch's targets."""
        return slice(*np.searchsorted(self.places, (start, stop)).tolist())


class _Whole(torch.autograd.Function):
    """Puts log-probs of several processes together; each gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, count: int, ranks: ContextRanks) -> Tensor:
        ctx.save_for_backward(places)
        whole = own.new_zeros(count).index_copy_(0, places, own)
        dist.all_reduce(whole, group=ranks.group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None, None


def split(batch: SharedBatch, ranks: ContextRanks) -> SplitBatch:
    """Return what this process computes of a batch.

    A process without a token of the batch computes its first one, which nobody sees.
    """
    device = batch.input_ids.device
    division = Division(batch.prompt_lengths, batch.completion_lengths, ranks.count)
    chunks, answers = division.chunks(ranks.rank), division.own_completions(ranks.rank)
    runs = chunks + answers
    tokens = np.concatenate([run.tokens for run in runs or [Run(0, 1, 0, 0)]])
    place = np.full(batch.input_ids.shape[1], -1)
    place[tokens] = np.arange(len(tokens)) if runs else -1
    logit_index = place[division.predicting()]
    (places,) = np.nonzero(logit_index >= 0)
    order, width = division.gathered()
    take, copy = onto(tokens, device), partial(onto, device=device)
    return SplitBatch(
        input_ids=batch.input_ids.index_select(1, take),
        position_ids=batch.position_ids.index_select(1, take),
        logit_index=copy(logit_index[places]),
        target_ids=batch.targets.target_ids.index_select(0, copy(places)),
        places=places,
        targets=batch.targets,
        ranks=ranks,
        own=sum(run.length for run in chunks),
        order=copy(order),
        width=width,
        on_themselves=_on_themselves([run.length for run in runs] or [1], device),
        on_prompts=tuple(_on_prompts(runs, batch.prompt_lengths, device)),
    )


def _on_themselves(lengths: Sequence[int], device: torch.device) -> Bounds:
    ends = onto(np.cumsum([0, *lengths], dtype=np.int32), device)
    return Bounds(ends, ends, max(lengths), max(lengths))


def _on_prompts(
    runs: Sequence[Run], prompts: Sequence[int], device: torch.device
) -> Iterator[PromptCall]:
    """Yield the calls; neighbours that see the same, such as completions of a group, are one."""
    starts, at = list(accumulate(prompts, initial=0)), 0
    calls = list[list[int]]()
    for run in runs:
        seen = [starts[run.group], starts[run.group] + run.seen]
        if calls and calls[-1][2:] == seen:
            calls[-1][1] += run.length
        elif run.seen:
            calls.append([at, at + run.length, *seen])
        at += run.length
    for first, last, start, stop in calls:
        counts = last - first, stop - start
        ends = onto(np.array([[0, count] for count in counts], np.int32), device)
        yield PromptCall(slice(first, last), slice(start, stop), Bounds(ends[0], ends[1], *counts))


def split_logps(batch: SplitBatch, head: Head, hidden: Tensor) -> Tensor:
    """Return the log-probs of all targets of a batch, `[S]`, from the states of own ones, `[s, H]`.

    They are differentiable in this process's states only.
    """
    return batch.whole(head_logps(head, hidden, batch.target_ids))


def split_loss(batch: SplitBatch, head: Head, hidden: Tensor, loss_of: LossOf) -> Tensor:
    """Return `head_loss` of the whole batch, from the states of own targets, `[s, H]`.

    The loss is the same in all processes; its gradient is that of this process's states.
    """
    pairs = iter(parts := batch.parts(batch.ranks.tile_rows(head)))

    def whole(logps: Tensor, _own: Part) -> Tensor:
        part, _ = next(pairs)
        return loss_of(batch.whole(logps, part.targets_at.start, part.targets_at.stop), part)

    return head_loss(head, hidden, batch.target_ids, [own for _, own in parts], whole)
