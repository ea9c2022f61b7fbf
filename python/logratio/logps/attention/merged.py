r"""Attention to the prompt and attention to oneself, merged: no key is gathered for a completion.

With :math:`o_1, \ell_1` and :math:`o_2, \ell_2` the outputs and log-sum-exps of attention to two
sets of keys, attention to both is :math:`(1 - w)\,o_1 + w\,o_2` with
:math:`w = \sigma(\ell_2 - \ell_1)`, and :math:`\ell = \log(e^{\ell_1} + e^{\ell_2})` (the online
softmax of Milakov and Gimelshein 2018, arXiv 1805.02867).

The backward pass of FlashAttention (Dao 2023, arXiv 2307.08691) makes the probabilities again as
:math:`e^{s - \ell}`, and takes one number of each query from its output and the output's gradient.
Given the whole output and the whole :math:`\ell`, a call for some of the keys gives these keys'
exact gradients, and the sum of the calls that of the queries.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from logratio.logps.attention.flash import Flash
from logratio.logps.sequences import Sequences


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
        query: `[1, H, T, D]`, in a dtype that the kernel takes.
        key: `[1, Hk, T, D]`; `Hk` divides `H`.
        value: as `key`.
        sequences: who sees whom.
        flash: the kernel.
        scaling: factor of the scores; `D ** -0.5` where None.
    """
    states = (part[0].transpose(0, 1) for part in (query, key, value))
    return cast(Tensor, _Merged.apply(*states, sequences, flash, scaling))[None]


def merging_pays(sequences: Sequences, heads: int, key_heads: int) -> bool:
    """Tell whether merging moves fewer numbers than gathering the keys does: an estimate.

    Counted is what each moves besides the attention itself, forward and backward, in units of a
    token's queries (`H * D`). Gathering: keys and values read and written, their gradients
    brought back. Merging: a second output and gradient of the queries, the latter in float32,
    and the sums with the first. Both: gradients of the keys, which FlashAttention-2 makes for
    each head of the queries and then adds up. So pairs are gathered, and eight completions of a
    prompt that is a third of the tokens are merged. The products are the same, and not counted.
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
        out, lse = _merge(own, theirs)
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
            total.index_copy_(0, rows, part.add_(total.index_select(0, rows)))  # each row once
        return *totals, None, None, None


def _merge(own: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge outputs `[T, H, D]` and log-sum-exps `[H, T]`; what has no keys in `theirs` is `own`.

    Shares stay in float32, and outputs in their own dtype: each is read and written in place.
    In bfloat16 the output is then 1.9e-3 from float64, that of one call 1.6e-3, and the gradient of
    the queries 2.4e-3 and 1.4e-3: a rounding more (relative norms, of random numbers).
    """
    (out, lse), (other, other_lse) = own, theirs
    other_lse = other_lse.masked_fill(other_lse == torch.inf, -torch.inf)
    share = torch.sigmoid(other_lse - lse).t()[:, :, None]
    return out.mul_(1 - share).addcmul_(other, share), torch.logaddexp(lse, other_lse)
