"""Attention in a tree of tokens: a sequence sees its own path, whatever branches off from it.

The row of a `TreeBatch` is a tree in depth-first order: each run goes on from some token before it.
With `end(k)` the first token after everything that goes on from token `k`, a token `q` sees `k`
exactly where `k <= q < end(k)`.

Attention takes neighbouring runs in one call. Its queries are a stretch of the row, its keys the
path of its first run and the same stretch, so that whatever any of them sees is there:

    cells of a call = queries · (path + queries), and half of that for a run without a path

A path is copied for each call that goes on from it, and the gradients of the copies are added up in
a fixed order. How runs are cut into calls is chosen so that the cells, `CALL` for each call, and
`COPY` for each copied key, are fewest; no choice changes a result beyond rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.attention.kernels import forced_kernel
from logratio.logps.attention.sdpa import Scoring, attend_call
from logratio.logps.batch import TreeBatch

CALL = 4_000
"""Scores of a head that take as long as one more call."""
COPY = 4
"""Scores of a head that take as long as copying one key and its value, and their gradients back."""
LOOK_BACK = 64
"""Most runs of a call."""

Pieces = tuple[tuple[int, int], ...]
"""Stretches of the row, each its first token and the one after its last."""


@dataclass(frozen=True)
class Call:
    """One call: a stretch of queries, and the keys that they may see.

    Attributes:
        start: the first query's token.
        stop: the token after the last query.
        path: what the first run goes on from; the keys are these tokens, then the queries' own.
        mask: `[1, 1, Lq, Lk]`, 0 where a query (row) sees a key (column) and -inf elsewhere; None
            where there is no path and each query sees every key up to its own place.
    """

    start: int
    stop: int
    path: Pieces
    mask: Tensor | None

    @property
    def queries(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def keys(self) -> Pieces:
        """All keys as stretches of the row, the queries' own tokens last."""
        return (*self.path, (self.start, self.stop))


class SharedTree:
    """Where the runs of a tree lie, and the attention calls that follow.

    Attributes:
        kernel: that `use_kernel` asks for; a tree has attention in several calls only.
        sequences: None: variable-length kernels do not take a tree.
    """

    def __init__(self, batch: TreeBatch) -> None:
        self.kernel, self.sequences = forced_kernel(), None
        self._row = batch.position_ids[0]
        self._starts = batch.starts.astype(np.int64)
        offsets = batch.key_offsets.tolist()
        own = np.diff(self._starts).tolist()
        keys = [batch.key_index[a:b] for a, b in pairwise(offsets)]
        self._paths = [all_[: len(all_) - n] for all_, n in zip(keys, own, strict=True)]
        self._ends = torch.from_numpy(_ends(self._starts, keys, self._paths)).to(self._row.device)
        self._plans: dict[tuple[int | None, torch.dtype, bool], list[Call]] = {}

    def plan(self, window: int | None, dtype: torch.dtype, *, masked: bool = False) -> list[Call]:
        """Return the calls that attend for this row, made once and used by every layer alike.

        Args:
            window: tokens that a query looks back on, itself included; None: all.
            dtype: of the queries, and so of the masks.
            masked: give a mask also where plain causal attention says the same.
        """
        key = (window, dtype, masked)
        if key not in self._plans:
            lengths = np.array([len(path) for path in self._paths])
            cuts = cut(self._starts, lengths)
            self._plans[key] = [self._call(a, b, *key) for a, b in pairwise(cuts)]
        return self._plans[key]

    def _call(
        self, first: int, last: int, window: int | None, dtype: torch.dtype, masked: bool
    ) -> Call:
        """Make the call of runs `first` to `last` (exclusive)."""
        start, stop = int(self._starts[first]), int(self._starts[last])
        path, mask = self._paths[first], None
        is_causal = last == first + 1 and not len(path)
        if masked or not is_causal or (window is not None and window < stop - start):
            mask = self._mask(path, start, stop, window, dtype)
        return Call(start, stop, _pieces(path), mask)

    def _mask(
        self, path: np.ndarray, start: int, stop: int, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        queries = torch.arange(start, stop, device=self._row.device)
        keys = torch.cat([torch.from_numpy(path).to(queries.device), queries])
        own = queries[:, None]
        hidden = (own < keys).logical_or_(own >= self._ends[keys])
        if window is not None:
            hidden |= self._row[queries, None] - window >= self._row[keys]
        zeros = torch.zeros(1, 1, *hidden.shape, dtype=dtype, device=queries.device)
        return zeros.masked_fill_(hidden, -torch.inf)


def _ends(starts: np.ndarray, keys: list[np.ndarray], paths: list[np.ndarray]) -> np.ndarray:
    """Return the first token after all that goes on from each token, int64 `[T]`."""
    ends = np.full(starts[-1], starts[-1], dtype=np.int64)
    for left, start, path in zip(keys[:-1], starts[1:-1], paths[1:], strict=True):
        ends[left[len(path) :]] = start  # the next run branches off before these
    return ends


def _pieces(path: np.ndarray) -> Pieces:
    """Return tokens, int64, rising, as stretches of the row."""
    breaks = np.flatnonzero(np.diff(path) != 1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in np.split(path, breaks) if len(part))


def cut(starts: np.ndarray, paths: np.ndarray) -> list[int]:
    """Cut runs into the cheapest calls; return where each begins, and how many runs there are.

    Args:
        starts: int64 `[Q + 1]`, the first token of each run, and `T`.
        paths: int64 `[Q]`, tokens that each run goes on from.
    """
    best, before = np.zeros(len(starts)), np.zeros(len(starts), dtype=np.int64)
    for last in range(1, len(starts)):
        first = max(0, last - LOOK_BACK)
        queries, known = starts[last] - starts[first:last], paths[first:last]
        cells = (queries * (known + queries)).astype(np.float64)
        if known[-1] == 0:  # a run by itself needs no mask, and half of the scores
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

    Keys and values may have fewer heads, each for as many queries' heads (GQA).
    """
    calls = tree.plan(scoring.window, query.dtype, masked=not scoring.is_plain)
    stretches = [call.keys for call in calls]
    keys, values = gather(key, stretches), gather(value, stretches)
    queries = query.split([call.queries for call in calls], dim=2)
    parts = zip(queries, keys, values, calls, strict=True)
    attended = torch.cat([attend_call(q, k, v, call.mask, scoring) for q, k, v, call in parts], 2)
    return attended.transpose(1, 2)[0].contiguous()[None]


def gather(states: Tensor, calls: Sequence[Pieces]) -> tuple[Tensor, ...]:
    """Return the keys (or values) of each call: `[1, H, T, D]` to `[1, H, Lk, D]` each.

    The last stretches of all calls are the whole row, each token once. Gradients of copies are
    added up in the order of the calls, in float32 or wider.
    """
    gathered: tuple[Tensor, ...] = _Gather.apply(states, calls)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, calls: Sequence[Pieces]) -> tuple[Tensor, ...]:
        ctx.calls, ctx.shape = calls, states.shape
        return tuple(
            torch.cat([states[:, :, start:stop] for start, stop in pieces], 2) for pieces in calls
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        total = gradients[0].new_empty(ctx.shape, dtype=dtype)
        for pieces, gradient in zip(ctx.calls, gradients, strict=True):
            (start, stop), length = pieces[-1], gradient.shape[2]
            total[:, :, start:stop] = gradient[:, :, length - (stop - start) :]
        for pieces, gradient in zip(ctx.calls, gradients, strict=True):
            at = 0
            for start, stop in pieces[:-1]:
                total[:, :, start:stop] += gradient[:, :, at : at + stop - start]
                at += stop - start
        return total.to(gradients[0].dtype), None
