"""FlashAttention's work done plainly, on any device and in any dtype, from its documentation.

Both passes, sequence by sequence: what torch's operators and FlashAttention-3 promise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor

from logratio.logps.attention.flash import Flash
from logratio.logps.sequences import Bounds

States = tuple[Tensor, Tensor, Tensor]


def spans(bounds: Bounds) -> Iterator[tuple[slice, slice]]:
    """The queries and the keys of each sequence; none may be longer than it was said to be."""
    ends = bounds.queries.tolist(), bounds.keys.tolist()
    assert bounds.queries.dtype == bounds.keys.dtype == torch.int32
    assert ends[0][0] == ends[1][0] == 0
    assert len(ends[0]) == len(ends[1])
    for queries, keys in zip(*map(pairwise, ends), strict=True):
        assert 0 <= queries[1] - queries[0] <= bounds.max_queries
        assert 0 <= keys[1] - keys[0] <= bounds.max_keys
        yield slice(*queries), slice(*keys)


def scores_of(query: Tensor, key: Tensor, causal: bool, scale: float | None) -> Tensor:
    """`[H, q, k]`, -inf where a query does not see a key; both aligned at the end."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (scale or query.shape[-1] ** -0.5)
    if causal:
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool)
        scores = scores.masked_fill(unseen.triu(1 + len(key) - len(query)), -inf)
    return scores


def plain_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    causal: bool,
    scale: float | None,
    *,
    nothing: float = inf,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; `nothing` is that of a query without keys."""
    out, lse = torch.zeros_like(query), query.new_full((query.shape[1], len(query)), nothing)
    for q, k in spans(bounds):
        if k.stop > k.start and q.stop > q.start:
            scores = scores_of(query[q], key[k], causal, scale)
            values = value[k].repeat_interleave(query.shape[1] // key.shape[1], 1)
            out[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            lse[:, q] = scores.logsumexp(-1)
    assert spans_end(bounds) == (len(query), len(key))
    return out, lse


def spans_end(bounds: Bounds) -> tuple[int, int]:
    return int(bounds.queries[-1]), int(bounds.keys[-1])


def plain_backward(
    gradient: Tensor,
    states: States,
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    causal: bool,
    scale: float | None,
) -> States:
    """Gradients, by the formulas of Dao 2023, from a forward pass's results alone."""
    query, key, value = states
    times = query.shape[1] // key.shape[1]
    found = tuple(torch.zeros_like(part) for part in states)
    for q, k in spans(bounds):
        if k.stop == k.start or q.stop == q.start:
            continue
        weights = (scores_of(query[q], key[k], causal, scale) - lse[:, q, None]).exp()
        values = value[k].repeat_interleave(times, 1)
        slope = torch.einsum("qhd,khd->hqk", gradient[q], values)
        slope = weights * (slope - (gradient[q] * out[q]).sum(-1).t()[:, :, None])
        slope = slope * (scale or query.shape[-1] ** -0.5)
        keys = key[k].repeat_interleave(times, 1)
        found[0][q] = torch.einsum("hqk,khd->qhd", slope, keys)
        for total, part in (
            (found[1], torch.einsum("hqk,qhd->khd", slope, query[q])),
            (found[2], torch.einsum("hqk,qhd->khd", weights, gradient[q])),
        ):
            total[k] = part.unflatten(1, (-1, times)).sum(2)
    return found  # type: ignore[return-value]


PLAIN = Flash(plain_forward, plain_backward)


@contextmanager
def on_cpu(flash: Flash = PLAIN) -> Iterator[list[str]]:
    """Let torch's operators run on a CPU inside the block; yields the names of those that ran."""
    ran: list[str] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float | None = None) -> Any:
        *bounds, dropout, causal, debug = rest
        assert (dropout, debug) == (0.0, False)
        ran.append("forward")
        out, lse = flash.forward(q, k, v, Bounds(*bounds), causal, scale)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(()), torch.empty(0)

    def backward(gradient: Tensor, *rest: Any, scale: float | None = None) -> States:
        q, k, v, out, lse, *bounds, dropout, causal, _random, _unused = rest
        assert dropout == 0.0
        ran.append("backward")
        return flash.backward(gradient, (q, k, v), out, lse, Bounds(*bounds), causal, scale)

    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield ran
    finally:
        library._destroy()
