"""Merged FlashAttention: attention to the prompt and within the sequence, in separate calls."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.attention.kernels import Kernel
from logratio.logps.sequences import Bounds, Sequences

Forward = Callable[[Tensor, Tensor, Tensor, Bounds, bool, float | None], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Bounds, bool, float | None],
    tuple[Tensor, Tensor, Tensor],
]


class Flash(NamedTuple):
    """The forward and backward pass of a FlashAttention kernel.

    Attributes:
        forward: Maps queries `[T, H, D]`, keys and values `[K, Hk, D]`, their `Bounds`, whether the
            attention is causal (aligned at the end of a sequence), and the scale of the scores
            (None: `D ** -0.5`) to the output `[T, H, D]` and the log-sum-exp of the scores, float32
            `[H, T]`. A query without keys has an output of 0 and a log-sum-exp of plus or minus
            infinity.
        backward: Maps the output's gradient, the queries, keys and values, the output, the
            log-sum-exp, and the other arguments of `forward` to the gradients of queries, keys and
            values.
    """

    forward: Forward
    backward: Backward


def flash_of(kernel: Kernel) -> Flash:
    """Return the FlashAttention kernel that "merged" or "flash3_merged" uses."""
    return _flash3() if kernel == "flash3_merged" else TORCH


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(query, key, value, *_filled(bounds)), 0.0, causal, False, scale=scale
    )
    return out, lse


def _backward(
    gradient: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # The random state of dropout is required, but not used.
    random = torch.zeros(2, dtype=torch.uint64, device=out.device)
    unused = torch.empty(0, device=out.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *(gradient, *states, out, lse, *_filled(bounds)), 0.0, causal, random, unused, scale=scale
    )
    return found


def _filled(bounds: Bounds) -> tuple[Tensor, Tensor, int, int]:
    """Return the arguments of torch's operators, with a maximum of at least two queries.

    With a maximum of one, torch assumes that every sequence has exactly one query.
    """
    return bounds.queries, bounds.keys, max(2, bounds.max_queries), bounds.max_keys


TORCH = Flash(_forward, _backward)
"""torch's operators of FlashAttention-2, which `varlen_attn` uses too."""


@cache
def _flash3() -> Flash:
    """Return the FlashAttention-3 kernel."""
    package = import_module("flash_attn_interface")

    def forward(
        query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = package.flash_attn_varlen_func(
            *(query, key, value, *bounds),
            softmax_scale=scale,
            causal=causal,
            return_attn_probs=True,
        )
        return out, lse

    def backward(
        gradient: Tensor,
        states: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        bounds: Bounds,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = states
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        package._flash_attn_backward(
            *(gradient, query, key, value, out, lse),
            *(bounds.queries, bounds.keys, None, None, bounds.max_queries, bounds.max_keys),
            *found,
            query.shape[-1] ** -0.5 if scale is None else scale,
            causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return found

    return Flash(forward, backward)


def attend_merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    flash: Flash,
    scaling: float | None,
) -> Tensor:
    """Attend within each sequence: `[1, H, T, D]` to `[1, T, H, D]`.

    Args:
        query: Queries `[1, H, T, D]`, in a dtype that the kernel supports.
        key: Keys `[1, Hk, T, D]`; `Hk` divides `H`.
        value: Values, with the shape of `key`.
        sequences: Sequences of the row.
        flash: The kernel.
        scaling: Scale of the scores; None: `D ** -0.5`.
    """
    states = (part[0].transpose(0, 1) for part in (query, key, value))
    return cast(Tensor, _Merged.apply(*states, sequences, flash, scaling))[None]


def merging_pays(sequences: Sequences, heads: int, key_heads: int) -> bool:
    """Estimate whether merging moves less data than gathering the keys.

    The estimate counts the data that each method moves in addition to the attention itself, forward
    and backward, in units of a token's queries (`H * D`). Gathering reads and writes keys and
    values, and scatters their gradients. Merging writes a second output and a second gradient of
    the queries, the latter in float32, and adds them to the first. Both write gradients of the
    keys, which FlashAttention-2 computes for each query head and then sums. The matrix products are
    the same and not counted. For example, pairs are gathered, and eight completions of a prompt
    that has a third of the tokens are merged.

    Args:
        sequences: Sequences of the row.
        heads: Heads of the queries.
        key_heads: Heads of the keys.
    """
    share = key_heads / heads
    gradients = 2 if heads == key_heads else 4 + 2 * share
    tokens, prompts, keys = sequences.tokens, sequences.prompt_tokens, len(sequences.key_index)
    gathered = (6 * share + gradients) * keys + 2 * share * tokens
    merged = (14 + gradients) * tokens + (14 * share + gradients) * prompts
    return merged < gathered


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sequences: Sequences,
        flash: Flash,
        scaling: float | None,
    ) -> Tensor:
        rows = sequences.prompt_rows
        own = flash.forward(query, key, value, sequences.on_themselves, True, scaling)
        prompts = key.index_select(0, rows), value.index_select(0, rows)
        theirs = flash.forward(query, *prompts, sequences.on_prompts, False, scaling)
        out, lse = merge(own, theirs)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.sequences, ctx.flash, ctx.scaling = sequences, flash, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        sequences, flash, scaling = ctx.sequences, ctx.flash, ctx.scaling
        rows, whole = sequences.prompt_rows, (out, lse)
        totals = flash.backward(
            gradient, (query, key, value), *whole, sequences.on_themselves, True, scaling
        )
        prompts = query, key.index_select(0, rows), value.index_select(0, rows)
        parts = flash.backward(gradient, prompts, *whole, sequences.on_prompts, False, scaling)
        totals[0].add_(parts[0])
        for total, part in zip(totals[1:], parts[1:], strict=True):
            # Rows are distinct, so index_copy_ is deterministic, unlike index_add_.
            total.index_copy_(0, rows, part.add_(total.index_select(0, rows)))
        return *totals, None, None, None


def merge(own: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge outputs `[T, H, D]` and log-sum-exps `[H, T]` of attention to disjoint sets of keys.

    Queries without keys in `theirs` keep the output of `own`. Shares are float32, and outputs keep
    their dtype and are updated in place. In bfloat16 this adds one rounding: on random data, the
    relative error to float64 is 1.9e-3 for the output and 2.4e-3 for the gradient of the queries,
    against 1.6e-3 and 1.4e-3 for a single call.
    """
    (out, lse), (other, other_lse) = own, theirs
    other_lse = other_lse.masked_fill(other_lse == torch.inf, -torch.inf)
    share = torch.sigmoid(other_lse - lse).t()[:, :, None]
    return out.mul_(1 - share).addcmul_(other, share), torch.logaddexp(lse, other_lse)
