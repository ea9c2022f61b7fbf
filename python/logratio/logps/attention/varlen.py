"""Attention of all sequences of a batch in one variable-length call per layer, for CUDA."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from logratio.logps.attention.kernels import Kernel, constant_in_graphs
from logratio.logps.sequences import Row


def gather_keys(states: Tensor, sequences: Row) -> Tensor:
    """Return the concatenated keys (or values) of all sequences: `[T, H, D]` to `[K, H, D]`.

    A prompt token occurs once for its prompt and once for each completion (in a tree, once for each
    run that continues it), and its gradient is the sum over these copies. The sum has a fixed
    order, so it is deterministic, unlike the gradient of `index_select`, which uses atomics on
    CUDA. It is accumulated in float32 and rounded once.
    """
    return cast(Tensor, _Gather.apply(states, sequences))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, sequences: Row) -> Tensor:
        ctx.sequences = sequences
        return states.index_select(0, sequences.key_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.index_select(0, ctx.sequences.own_place)
        for tokens, places, counted in ctx.sequences.shared_keys:
            parts = gradient.index_select(0, places.flatten()).unflatten(0, places.shape)
            if counted is not None:
                parts = parts.masked_fill_(~counted[:, :, None, None], 0)
            summed = parts.sum(1, dtype=gradient.dtype)  # autocast would return float32
            total.index_copy_(0, tokens, summed)  # tokens are distinct: deterministic
        return total, None


def attend_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Row,
    *,
    kernel: Kernel,
    scaling: float | None,
    softcap: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Attend within each sequence: `[1, H, T, D]` to `[1, T, H, D]`.

    Args:
        query: Queries `[1, H, T, D]`, float16 or bfloat16.
        key: Keys `[1, Hk, T, D]`; `Hk` divides `H`.
        value: Values, with the shape of `key`.
        sequences: Sequences of the row, or runs of its tree.
        kernel: "flash3", "varlen" or "flash_attn".
        scaling: Scale of the scores; None: `D ** -0.5`.
        softcap: Cap of the scores; not supported by "varlen".
        dropout: Dropout probability; supported by "flash_attn" only.
        window: A token sees itself and the `window - 1` tokens before it; None: all before it.
    """
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    keys, values = gather_keys(keys, sequences), gather_keys(values, sequences)
    # For unequal lengths, all kernels align causal attention and windows at the end.
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if kernel == "varlen":
        out = _torch_varlen(queries, keys, values, sequences, scale=scaling, **options)
    else:
        options |= {"softcap": softcap or 0.0, "softmax_scale": scaling}
        options |= {"dropout_p": dropout} if kernel == "flash_attn" else {}
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        call = _flash_function(kernel)
        out = call(queries, keys, values, *sequences.with_keys, causal=True, **options)
    return out[None]


def _torch_varlen(
    queries: Tensor, keys: Tensor, values: Tensor, sequences: Row, **options: Any
) -> Tensor:
    """Call torch's `varlen_attn` with FlashAttention-2.

    Its other backend, cuDNN, aligns causal attention of unequal lengths at the start. torch does
    not choose it for such lengths; it is disabled here to be safe.
    """
    from torch.nn.attention.varlen import varlen_attn

    call: Callable[..., Any] = varlen_attn
    if _has_enable_gqa():
        options["enable_gqa"] = True
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out: Tensor = call(queries, keys, values, *sequences.with_keys, **options)
    return out


@constant_in_graphs
def _has_enable_gqa() -> bool:
    """Return whether GQA must be enabled; torch 2.11 supports it without an argument."""
    return "enable_gqa" in _parameters()


@cache
def _parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


def _flash_function(kernel: Kernel) -> Callable[..., Tensor]:
    """Return the variable-length function of FlashAttention-2 or 3; both have the same name."""
    name = "flash_attn_interface" if kernel == "flash3" else "flash_attn"
    function: Callable[..., Tensor] = import_module(name).flash_attn_varlen_func
    return function
