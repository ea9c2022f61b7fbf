"""Attention by torch's SDPA in the calls of a plan, for CPUs, where each call costs little."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention

from logratio.logps.attention.parts import Run, attend_in_parts
from logratio.logps.attention.plan import Moves, SharedPrompt


@dataclass(frozen=True)
class Scoring:
    """Options of a model's attention that affect its scores.

    Attributes:
        scaling: Scale of the scores; None: `D ** -0.5`.
        dropout: Dropout probability of the attention weights.
        window: A token sees itself and the `window - 1` tokens before it; None: all before it.
        softcap: Cap `c` of the scores, `c * tanh(scores / c)` (Gemma 2); None: no cap.
        sinks: Attention sinks `[H]`: an additional score without a value (gpt-oss); None: no sinks.
    """

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's SDPA supports all options."""
        return self.softcap is None and self.sinks is None


def attend(
    query: Tensor, key: Tensor, value: Tensor, shared_prompt: SharedPrompt, scoring: Scoring
) -> Tensor:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`, contiguous.

    Keys and values may have fewer heads (GQA).
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
        if call.runs:
            out.append(attend_runs(q, k, v, call.runs, scoring))
        else:
            out.append(_one_row(attend_call(q, k, v, call.mask, scoring)))
    attended = torch.cat(out, dim=2).transpose(1, 2)
    # Both results are views of a tensor without the first axis: compiled layers guard on that.
    if plan.moves is None:
        return attended[0].contiguous()[None]
    tokens: Tensor = _FromRows.apply(attended[0], plan.moves)
    return tokens[None]


def attend_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attend in one call: queries `[B, H, Lq, D]`, keys and values `[B, Hk, Lk, D]`.

    The mask `[B, 1, Lq, Lk]` is added to the scores. None means plain causal attention, and is
    allowed only if `scoring.is_plain`.
    """
    return (_torch_call if scoring.is_plain else _own_call)(q, k, v, mask, scoring)


def attend_runs(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[Run], scoring: Scoring) -> Tensor:
    """Attend within long runs in parts: queries `[1, H, Q, D]`, keys and values `[1, Hk, T, D]`.

    Scores are in the dtype that autocast would choose, also in the backward pass, which runs
    outside of autocast.
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    plain = scoring.is_plain and not scoring.dropout

    def attend_part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
        return attend_call(q, k, v, mask, replace(scoring, sinks=sinks))

    with torch.autocast(kind, enabled=False):
        return attend_in_parts(
            q,
            k,
            v,
            runs,
            attend_part,
            window=scoring.window,
            stored_heads=1 if plain else q.shape[1],
            sinks=scoring.sinks,
        )


def _torch_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        k, v, options = _for_each_head(q, k, v)
    depth, width = q.shape[-1], v.shape[-1]
    if depth != width:  # for unequal heads, torch would store the scores of the whole call
        q, k, v = (pad(x, (0, max(depth, width) - x.shape[-1])) for x in (q, k, v))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        dropout_p=scoring.dropout,
        is_causal=mask is None,
        scale=depth**-0.5 if scoring.scaling is None else scoring.scaling,
        **options,
    )
    return out if depth == width else out[..., :width]


def _for_each_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Prepare keys and values for GQA: on a CPU, torch's fused kernel supports it directly.

    On CUDA the only fused kernel with masks does not, and torch would use an unfused one, so keys
    and values are repeated.
    """
    if q.device.type == "cpu":
        return k, v, {"enable_gqa": True}
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1), {}


def _own_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attend with a cap or sinks, which torch's SDPA lacks; softmax in float32 or wider."""
    assert mask is not None
    rows, heads, length, depth = q.shape
    shape = (rows, k.shape[1], heads // k.shape[1], length)
    scale = depth**-0.5 if scoring.scaling is None else scoring.scaling
    # Query heads with the same key head are stacked along the length, so keys are not copied.
    scores = q.reshape(rows, k.shape[1], -1, depth) @ k.transpose(2, 3) * scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.view(*shape, -1) + mask[:, :, None]
    weights = _softmax(scores, scoring.sinks).to(v.dtype)
    weights = drop(weights, scoring.dropout, training=scoring.dropout > 0)
    return (weights.flatten(2, 3) @ v).reshape(rows, heads, length, -1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax of scores `[B, Hk, H / Hk, Lq, Lk]`, including sinks if there are any."""
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return scores.softmax(dim=-1, dtype=dtype)
    sink_scores = sinks.view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink_scores.to(scores.dtype)], dim=-1).softmax(dim=-1, dtype=dtype)[
        ..., :-1
    ]


def _in_rows(heads: Tensor, moves: Moves) -> Tensor:
    """Move tokens into rows: `[1, H, T, D]` to `[1, H, R, D]`."""
    moved: Tensor = _IntoRows.apply(heads[0].transpose(0, 1), moves)
    return moved.transpose(0, 1)[None]


def _rows(heads: Tensor, rows: int) -> Tensor:
    """Split a block into its rows: `[1, H, B * L, D]` to `[B, H, L, D]`."""
    return heads if rows == 1 else heads[0].unflatten(1, (rows, -1)).transpose(0, 1)


def _one_row(heads: Tensor) -> Tensor:
    """Concatenate rows to a block: `[B, H, L, D]` to `[1, H, B * L, D]`."""
    return heads if len(heads) == 1 else heads.transpose(0, 1).flatten(1, 2)[None]


class _IntoRows(torch.autograd.Function):
    """`x[take]`, with the gradient `g[put]`: `index_add` would be many times slower.

    The gradient of padding is 0, because no real token sees it, so it need not be added.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return tokens.index_select(0, moves.take)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_select(0, ctx.moves.put), None


class _FromRows(torch.autograd.Function):
    """`x[put]`: the inverse of `_IntoRows`, which drops padding."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return places.index_select(0, moves.put)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        moves: Moves = ctx.moves
        return gradient.index_select(0, moves.take) * moves.real[:, None, None], None
