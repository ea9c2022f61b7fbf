"""Attention in a row whose tokens are divided among processes (context parallelism).

A token sees its own run, and the tokens of the prompt before that run. Both are plain attention:
causal, and full. Their outputs are merged by the log-sum-exps of their scores, as in `flash.py`.
Keys and values of the prompts are gathered from all processes in each layer, forward and backward,
so that no layer keeps them, as in Llama 3 (arXiv 2407.21783, section 3.3.2).
"""

from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.attention.flash import Flash, flash_of, merge
from logratio.logps.attention.kernels import (
    MERGED,
    KernelError,
    Wanted,
    kernel_for,
    missing_kernels,
)
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.context_parallel import SplitBatch
from logratio.logps.sequences import Bounds

States = tuple[Tensor, Tensor, Tensor]


def attend_split(
    query: Tensor, key: Tensor, value: Tensor, batch: SplitBatch, scoring: Scoring
) -> Tensor:
    """Attend in the tokens of this process: `[1, H, t, D]` to `[1, t, H, D]`.

    Args:
        query: Queries `[1, H, t, D]`.
        key: Keys `[1, Hk, t, D]`; `Hk` divides `H`.
        value: Values, with the shape of `key`.
        batch: The tokens.
        scoring: Options of the attention.

    Raises:
        KernelError: No kernel with log-sum-exps supports this attention.
    """
    flash = _flash_for(query, key, value, scoring)
    states = (part[0].transpose(0, 1) for part in (query, key, value))
    return cast(Tensor, _Split.apply(*states, batch, flash, scoring.scaling))[None]


def _flash_for(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Flash:
    reasons = {
        "a sliding window": scoring.window is not None,
        "soft-capped scores": scoring.softcap is not None,
        "attention sinks": scoring.sinks is not None,
        "dropout": scoring.dropout > 0,
        "values of another size than keys": value.shape[-1] != key.shape[-1],
    }
    if found := [what for what, has in reasons.items() if has]:
        raise KernelError(f"a prompt is not split with {found[0]}")
    if query.device.type == "cpu":
        return CPU
    wanted = Wanted(
        *(query.device.type, query.dtype, query.shape[-1], value.shape[-1]),
        heads=query.shape[1],
        key_heads=key.shape[1],
        repeated=True,
    )
    choice = kernel_for(wanted, missing_kernels())
    if choice.name not in MERGED:
        raise KernelError(f"a prompt is split with FlashAttention only: {choice}")
    return flash_of(choice.name)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: SplitBatch,
        flash: Flash,
        scaling: float | None,
    ) -> Tensor:
        out, lse = flash.forward(query, key, value, batch.on_themselves, True, scaling)
        keys, values = _gathered(batch, key, value)
        for queries, seen, bounds in batch.on_prompts:
            given = query[queries], keys[seen], values[seen]
            found = flash.forward(*given, bounds, False, scaling)
            out[queries], lse[:, queries] = merge((out[queries], lse[:, queries]), found)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.batch, ctx.flash, ctx.scaling = batch, flash, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        batch, flash, scaling = ctx.batch, ctx.flash, ctx.scaling
        own = query, key, value
        totals = flash.backward(gradient, own, out, lse, batch.on_themselves, True, scaling)
        keys, values = _gathered(batch, key, value)
        # Sums over calls and processes are float32: bfloat16 would round each of them.
        wide = torch.promote_types(key.dtype, torch.float32)
        theirs = key.new_zeros(len(keys), 2, *key.shape[1:], dtype=wide)
        for queries, seen, bounds in batch.on_prompts:
            given = query[queries], keys[seen], values[seen]
            whole = out[queries], lse[:, queries]
            parts = flash.backward(gradient[queries], given, *whole, bounds, False, scaling)
            totals[0][queries] += parts[0]
            for place, part in enumerate(parts[1:]):
                theirs[seen, place] += part
        for total, part in zip(totals[1:], _scattered(batch, theirs), strict=True):
            total[: batch.own] += part
        return *totals, None, None, None


def _gathered(batch: SplitBatch, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of all prompts, `[P, Hk, D]` each."""
    own = torch.stack([key[: batch.own], value[: batch.own]], 1)
    padded = own.new_zeros(batch.width, *own.shape[1:])
    padded[: batch.own] = own
    found = own.new_empty(batch.ranks.count * batch.width, *own.shape[1:])
    dist.all_gather_into_tensor(found, padded, group=batch.ranks.group)
    keys, values = found.index_select(0, batch.order).unbind(1)
    return keys, values


def _scattered(batch: SplitBatch, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Sum gradients of all prompts, `[P, 2, Hk, D]`, over processes, for this process's tokens."""
    padded = gradients.new_zeros(batch.ranks.count * batch.width, *gradients.shape[1:])
    padded.index_copy_(0, batch.order, gradients)
    found = padded.new_empty(batch.width, *padded.shape[1:])
    dist.reduce_scatter_tensor(found, padded, group=batch.ranks.group)
    own_keys, own_values = found[: batch.own].unbind(1)
    return own_keys, own_values


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend sequence by sequence with torch's FlashAttention for CPUs."""
    outs, sums = [], []
    for queries, keys in _sequences(bounds):
        states = _on_heads(query[queries], key[keys], value[keys])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *states, 0.0, causal, scale=scale
        )
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1)


def _backward(
    gradient: Tensor,
    states: States,
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    causal: bool,
    scale: float | None,
) -> States:
    query, key, value = states
    found = [torch.empty_like(one) for one in states]
    for queries, keys in _sequences(bounds):
        given = _on_heads(gradient[queries], query[queries], key[keys], value[keys], out[queries])
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, lse[None, :, queries], 0.0, causal, scale=scale
        )
        for whole, part, at in zip(found, parts, (queries, keys, keys), strict=True):
            whole[at] = part[0].transpose(0, 1)
    return found[0], found[1], found[2]


def _sequences(bounds: Bounds) -> list[tuple[slice, slice]]:
    queries, keys = (_slices(ends) for ends in (bounds.queries, bounds.keys))
    return [*zip(queries, keys, strict=True)]


def _slices(ends: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(ends.tolist())]


def _on_heads(*tokens: Tensor) -> list[Tensor]:
    """Return `[L, H, D]` as `[1, H, L, D]`."""
    return [one.transpose(0, 1)[None] for one in tokens]


CPU = Flash(_forward, _backward)
