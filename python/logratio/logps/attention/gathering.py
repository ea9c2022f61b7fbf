"""Keys and values for variable-length attention: gathered, and their gradients brought back."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.sequences import Sequences


def gather_keys(states: Tensor, sequences: Sequences) -> Tensor:
    """Return the keys (or values) of every sequence, end to end: `[T, H, D]` to `[K, H, D]`.

    A prompt's token is there once for its prompt and once for each completion, and its gradient is
    the sum over these places. The sum is taken in a fixed order, so it is the same at every run;
    that of `index_select` adds with atomics on CUDA and is not. It is accumulated in float32 and
    rounded once, whatever the dtype.
    """
    return cast(Tensor, _Gather.apply(states, sequences))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return states.index_select(0, sequences.key_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        tokens, places, counted = ctx.sequences.shared_keys
        total = gradient.index_select(0, ctx.sequences.own_place)
        parts = gradient.index_select(0, places.flatten()).unflatten(0, places.shape)
        if counted is not None:
            parts = parts.masked_fill_(~counted[:, :, None, None], 0)
        summed = parts.sum(1, dtype=gradient.dtype)  # which autocast would make float32
        return total.index_copy_(0, tokens, summed), None  # each token once: no atomics
