"""Attention in a prefix tree of tokens: each token sees the tokens on its path from the root.

The row of a `TreeBatch` is a tree in depth-first order: each run continues from an earlier token.
Let `end(k)` be the first position after all descendants of token `k`. Then token `q` sees `k` if
and only if `k <= q < end(k)`.

Consecutive runs are computed in one call. The queries of a call are a span of the row; its keys are
the path of its first run, followed by the same span, and include all keys that any query sees:

    cost of a call = queries · (path + queries), or half of that for a run without a path

The path is copied for each call, and the gradients of the copies are summed in a fixed order. The
split into calls minimizes the total of these costs, plus `CALL` for each call and `COPY` for each
copied key. The split changes results only by rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.attention.kernels import forced_kernel
from logratio.logps.attention.parts import MASK_CELLS, Run, Spans
from logratio.logps.attention.sdpa import Scoring, attend_call, attend_runs
from logratio.logps.batch import TreeBatch
from logratio.logps.sequences import onto

CALL = 4_000
"""Cost of one more call, in scores per head."""
COPY = 4
"""Cost of copying one key and its value, and adding back their gradients, in scores per head."""
LOOK_BACK = 64
"""Maximum number of runs in a call."""


@dataclass(frozen=True)
class Call:
    """One attention call: a span of queries, and the keys that they may see.

    Attributes:
        start: Position of the first query.
        stop: Position after the last query.
        path: Spans that precede the first run on its path. The keys are these tokens, followed by
            the span of the queries.
        mask: 0 where a query sees a key and -inf elsewhere, `[1, 1, Lq, Lk]`; None for plain causal
            attention without a path.
        runs: If the mask would be too large, the runs of the call, as places among its keys; they
            are computed in parts.
    """

    start: int
    stop: int
    path: Spans
    mask: Tensor | None
    runs: tuple[Run, ...] = ()

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.stop - self.start

    @property
    def keys(self) -> Spans:
        """Spans of all keys; the last one is that of the queries."""
        return (*self.path, (self.start, self.stop))


class SharedTree:
    """Positions of the runs of a tree in a row, and the attention calls of the row.

    Attributes:
        kernel: The kernel set by `use_kernel`, or None.
        sequences: The runs for variable-length kernels; None on a CPU.
    """

    def __init__(self, batch: TreeBatch) -> None:
        self.kernel, self.sequences = forced_kernel(), batch.branches
        self._row, self._runs = batch.position_ids[0], batch.runs
        self._starts = batch.runs.starts.astype(np.int64)
        self._plans: dict[tuple[int | None, torch.dtype, bool], list[Call]] = {}

    def plan(self, window: int | None, dtype: torch.dtype, *, masked: bool = False) -> list[Call]:
        """Return the attention calls of this row, computed once for all layers.

        Args:
            window: A token sees itself and the `window - 1` tokens before it; None: all before it.
            dtype: Dtype of the queries and masks.
            masked: Build masks also for plain causal attention.
        """
        key = (window, dtype, masked)
        if key not in self._plans:
            lengths = np.array([len(path) for path in self._runs.paths])
            cuts = split_runs(self._starts, lengths)
            self._plans[key] = [self._call(a, b, *key) for a, b in pairwise(cuts)]
        return self._plans[key]

    @cached_property
    def _ends(self) -> Tensor:
        return onto(self._runs.ends, self._row.device)

    def _call(
        self, first: int, last: int, window: int | None, dtype: torch.dtype, masked: bool
    ) -> Call:
        """Create the call of runs `first` to `last` (exclusive)."""
        start, stop = int(self._starts[first]), int(self._starts[last])
        path, mask = self._runs.paths[first], None
        is_causal = last == first + 1 and not len(path)
        runs: tuple[Run, ...] = ()
        if masked or not is_causal or (window is not None and window < stop - start):
            if (stop - start) * (len(path) + stop - start) > MASK_CELLS:
                runs = self._runs_of_call(first, last)
            else:
                mask = self._mask(path, start, stop, window, dtype)
        return Call(start, stop, _spans(path), mask, runs)

    def _runs_of_call(self, first: int, last: int) -> tuple[Run, ...]:
        """Return runs `first` to `last` (exclusive), as places among the keys of their call."""
        path, start = self._runs.paths[first], int(self._starts[first])
        keys = np.concatenate([path, np.arange(start, self._starts[last])])
        known = self._runs.paths[first:last]
        paths = [_spans(np.searchsorted(keys, path)) for path in known]
        bounds = pairwise((self._starts[first : last + 1] - start + len(path)).tolist())
        return tuple(Run(a, b, spans) for (a, b), spans in zip(bounds, paths, strict=True))

    def _mask(
        self, path: np.ndarray, start: int, stop: int, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        queries = torch.arange(start, stop, device=self._row.device)
        keys = torch.cat([onto(path, queries.device), queries])
        own = queries[:, None]
        hidden = (own < keys).logical_or_(own >= self._ends[keys])
        if window is not None:
            hidden |= self._row[queries, None] - window >= self._row[keys]
        zeros = torch.zeros(1, 1, *hidden.shape, dtype=dtype, device=queries.device)
        return zeros.masked_fill_(hidden, -torch.inf)


def _spans(path: np.ndarray) -> Spans:
    """Convert ascending positions, int64, to spans of the row."""
    breaks = np.flatnonzero(np.diff(path) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(path, breaks) if len(part))


def split_runs(starts: np.ndarray, paths: np.ndarray) -> list[int]:
    """Split runs into calls of the lowest total cost, by dynamic programming.

    Args:
        starts: First token of each run, and `T`, int64 `[Q + 1]`.
        paths: Number of tokens on the path before each run, int64 `[Q]`.

    Returns:
        Index of the first run of each call, followed by `Q`.
    """
    best, before = np.zeros(len(starts)), np.zeros(len(starts), dtype=np.int64)
    for last in range(1, len(starts)):
        first = max(0, last - LOOK_BACK)
        queries, known = starts[last] - starts[first:last], paths[first:last]
        cells = (queries * (known + queries)).astype(np.float64)
        if known[-1] == 0:  # a single run without a path is plain causal: half of the scores
            cells[-1] /= 2
        costs = best[first:last] + cells + COPY * known + CALL
        before[last] = first + int(costs.argmin())
        best[last] = costs[before[last] - first]
    cuts = [len(paths)]
    while cuts[-1]:
        cuts.append(int(before[cuts[-1]]))
    return cuts[::-1]


def attend_tree(
    query: Tensor, key: Tensor, value: Tensor, tree: SharedTree, scoring: Scoring
) -> Tensor:
    """Attend along the paths of a tree: `[1, H, T, D]` to `[1, T, H, D]`, contiguous.

    Keys and values may have fewer heads (GQA).
    """
    calls = tree.plan(scoring.window, query.dtype, masked=not scoring.is_plain)
    spans = [call.keys for call in calls]
    keys, values = gather(key, spans), gather(value, spans)
    queries = query.split([call.queries for call in calls], dim=2)
    parts = [
        attend_runs(q, k, v, call.runs, scoring)
        if call.runs
        else attend_call(q, k, v, call.mask, scoring)
        for q, k, v, call in zip(queries, keys, values, calls, strict=True)
    ]
    attended = torch.cat(parts, 2)
    return attended.transpose(1, 2)[0].contiguous()[None]


def gather(states: Tensor, calls: Sequence[Spans]) -> tuple[Tensor, ...]:
    """Return the keys (or values) of each call: `[1, H, T, D]` to `[1, H, Lk, D]` each.

    The last spans of all calls must cover the row, each token once. Gradients of copies are summed
    in the order of the calls, in float32 or wider.
    """
    gathered: tuple[Tensor, ...] = _Gather.apply(states, calls)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, calls: Sequence[Spans]) -> tuple[Tensor, ...]:
        ctx.calls, ctx.shape = calls, states.shape
        return tuple(
            torch.cat([states[:, :, start:stop] for start, stop in spans], 2) for spans in calls
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        total = gradients[0].new_empty(ctx.shape, dtype=dtype)
        for spans, gradient in zip(ctx.calls, gradients, strict=True):
            (start, stop), length = spans[-1], gradient.shape[2]
            total[:, :, start:stop] = gradient[:, :, length - (stop - start) :]
        for spans, gradient in zip(ctx.calls, gradients, strict=True):
            at = 0
            for start, stop in spans[:-1]:
                total[:, :, start:stop] += gradient[:, :, at : at + stop - start]
                at += stop - start
        return total.to(gradients[0].dtype), None
