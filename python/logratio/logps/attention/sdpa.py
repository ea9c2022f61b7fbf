"""Scaled dot-product attention in the calls of a plan: for a CPU, where a call costs little."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from logratio.logps.attention.plan import Moves, SharedPrompt


@dataclass(frozen=True)
class Scoring:
    """What a model's attention does with its scores.

    Attributes:
        scaling: factor on the products of queries and keys; None: `D ** -0.5`.
        dropout: probability.
        window: tokens that a query looks back on, itself included; None: all.
        softcap: `c` where scores are `c * tanh(scores / c)` (Gemma 2); None: as they are.
        sinks: `[H]`, a score beside the keys' that has no value (gpt-oss); None: no such score.
    """

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention does all of it."""
        return self.softcap is None and self.sinks is None


def attend(
    query: Tensor, key: Tensor, value: Tensor, shared_prompt: SharedPrompt, scoring: Scoring
) -> Tensor:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`, contiguous.

    Keys and values may have fewer heads, each for as many queries' heads (GQA).
    """
    plan = shared_prompt.plan(scoring.window, query.dtype, masked=not scoring.is_plain)
    if plan.moves:
        query, key, value = (_in_rows(x, plan.moves) for x in (query, key, value))
    queries = query.split([call.queries for call in plan.calls], dim=2)
    keys, values = key.split(plan.blocks, dim=2), value.split(plan.blocks, dim=2)
    out = []
    for call, q in zip(plan.calls, queries, strict=True):
        q, k, v = (_rows(x, call.rows) for x in (q, keys[call.block], values[call.block]))
        if call.keys < k.shape[2]:
            k, v = k[:, :, : call.keys], v[:, :, : call.keys]
        out.append(_one_row(attend_call(q, k, v, call.mask, scoring)))
    attended = torch.cat(out, dim=2).transpose(1, 2)
    # Both are views of a tensor without the first axis: compiled layers guard on that.
    if plan.moves is None:
        return attended[0].contiguous()[None]
    tokens: Tensor = _BackAgain.apply(attended[0], plan.moves)
    return tokens[None]


def attend_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attend in one call: queries `[B, H, Lq, D]`, keys and values `[B, Hk, Lk, D]`.

    The mask is `[B, 1, Lq, Lk]`, added to the scores; None: plain causal attention, which a scoring
    that is not plain never asks for.
    """
    return (_torch_call if scoring.is_plain else _own_call)(q, k, v, mask, scoring)


def _torch_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        k, v, options = _for_each_head(q, k, v)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        dropout_p=scoring.dropout,
        is_causal=mask is None,
        scale=scoring.scaling,
        **options,
    )


def _for_each_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Serve several heads of queries with one of keys: on a CPU torch's fused kernel does it.

    On CUDA its only kernel that takes a mask does not, and torch would go on without a fused one.
    """
    if q.device.type == "cpu":
        return k, v, {"enable_gqa": True}
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1), {}


def _own_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attend with scores that torch has no kernel for, softmax in float32 or wider."""
    assert mask is not None
    rows, heads, length, depth = q.shape
    shape = (rows, k.shape[1], heads // k.shape[1], length)
    scale = depth**-0.5 if scoring.scaling is None else scoring.scaling
    # The heads that one head of keys serves lie below one another: no copy of the keys is made.
    scores = q.reshape(rows, k.shape[1], -1, depth) @ k.transpose(2, 3) * scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.view(*shape, -1) + mask[:, :, None]
    weights = _softmax(scores, scoring.sinks).to(v.dtype)
    weights = drop(weights, scoring.dropout, training=scoring.dropout > 0)
    return (weights.flatten(2, 3) @ v).reshape(rows, heads, length, -1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Normalise scores `[B, Hk, H / Hk, Lq, Lk]` with a head's sink beside them, if it has one."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return scores.softmax(dim=-1, dtype=dtype)
    beside = sinks.view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, beside.to(scores.dtype)], dim=-1).softmax(dim=-1, dtype=dtype)[
        ..., :-1
    ]


def _in_rows(heads: Tensor, moves: Moves) -> Tensor:
    """Move tokens to their places: `[1, H, T, D]` to `[1, H, R, D]`."""
    moved: Tensor = _IntoRows.apply(heads[0].transpose(0, 1), moves)
    return moved.transpose(0, 1)[None]


def _rows(heads: Tensor, rows: int) -> Tensor:
    """Put the groups of a block below one another: `[1, H, B * L, D]` to `[B, H, L, D]`."""
    return heads if rows == 1 else heads[0].unflatten(1, (rows, -1)).transpose(0, 1)


def _one_row(heads: Tensor) -> Tensor:
    """Put groups end to end again: `[B, H, L, D]` to `[1, H, B * L, D]`."""
    return heads if len(heads) == 1 else heads.transpose(0, 1).flatten(1, 2)[None]


class _IntoRows(torch.autograd.Function):
    """`x[take]`, with a gradient that is a look-up too: `index_add` is many times as slow.

    What fills a row up is seen by nothing that counts, so it has no gradient to give back.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return tokens.index_select(0, moves.take)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.moves.put), None


class _BackAgain(torch.autograd.Function):
    """`x[put]`: the way back, which leaves out what fills rows up."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return places.index_select(0, moves.put)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        moves: Moves = ctx.moves
        return gradient.index_select(0, moves.take) * moves.real[:, None, None], None
