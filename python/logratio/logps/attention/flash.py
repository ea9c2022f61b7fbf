"""FlashAttention over sequences of any length, its forward and backward passes apart.

`merged` gives the backward pass another output and log-sum-exp than the forward pass returned,
which is impossible through functions that define their own gradients. Both kernels compute in
float16 or bfloat16, on CUDA.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from logratio.logps.attention.kernels import Kernel
from logratio.logps.sequences import Bounds

Forward = Callable[[Tensor, Tensor, Tensor, Bounds, bool, float | None], tuple[Tensor, Tensor]]
Backward = Callable[
    [Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Bounds, bool, float | None],
    tuple[Tensor, Tensor, Tensor],
]


class Flash(NamedTuple):
    """A kernel.

    Attributes:
        forward: from queries `[T, H, D]`, keys and values `[K, Hk, D]`, where their sequences
            begin, whether a query sees the keys up to its own place only (aligned at the end of a
            sequence), and the factor of the scores (`D ** -0.5` where None), to the output
            `[T, H, D]` and the log-sum-exp of the scores, float32 `[H, T]`. A query without keys
            has an output of 0 and an infinite log-sum-exp, of either sign.
        backward: from the output's gradient, the queries, keys and values, the output, the
            log-sum-exp, and the rest as before, to the gradients of queries, keys and values.
    """

    forward: Forward
    backward: Backward


def flash_of(kernel: Kernel) -> Flash:
    """Return the passes of the kernel that "merged" or "flash3_merged" builds on."""
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
    # The state of random numbers for dropout, of which there is none.
    random = torch.zeros(2, dtype=torch.uint64, device=out.device)
    unused = torch.empty(0, device=out.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *(gradient, *states, out, lse, *_filled(bounds)), 0.0, causal, random, unused, scale=scale
    )
    return found


def _filled(bounds: Bounds) -> tuple[Tensor, Tensor, int, int]:
    """Give lengths to torch, which takes sequences of one query at most to have exactly one."""
    return bounds.queries, bounds.keys, max(2, bounds.max_queries), bounds.max_keys


TORCH = Flash(_forward, _backward)
"""torch's own operators, FlashAttention-2: what its `varlen_attn` calls."""


@cache
def _flash3() -> Flash:
    """Return FlashAttention-3's own."""
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
