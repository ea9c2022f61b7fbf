"""Attention of a whole row by FlexAttention: for what variable-length kernels do not take.

The row attends to itself under a block mask that is made from the sequences, so nothing is
gathered; soft-capping is a function of the scores. Compiled on a GPU, at its first use.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from logratio.logps.batch import Sequences

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether the query (third) may see the key (fourth), both int positions in the row."""

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""For rows of fewer than 128 tokens torch has a kernel meant for decoding, which fails where they
and the queries' heads a key's head has make more than its tile holds."""

VARIANTS = 64
"""A model has some four to seven (with gradients and without, one tile and several, dtypes), and a
process may have several models; torch gives up after eight."""


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend within each sequence: `[1, H, T, D]` to `[1, T, H, D]`; `Hk` heads of keys divide `H`.

    On the CPU it has no backward pass, and makes the whole `[T, T]` of scores.
    """
    if window not in sequences.masks:
        sequences.masks[window] = block_mask(sequences, window)
    attend: Callable[..., Any] = flex_attention
    options: dict[str, Any] = {}
    if query.is_cuda:
        attend, options = _compiled(flex_attention), {"kernel_options": OPTIONS}
    out: Tensor = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap, query.device),
        block_mask=sequences.masks[window],
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )
    return out.transpose(1, 2)


def block_mask(sequences: Sequences, window: int | None) -> BlockMask:
    """Make the mask of a row of `T` tokens, on the device of `sequences`."""
    device = sequences.key_index.device
    create: Callable[..., BlockMask] = create_block_mask
    if device.type == "cuda":
        create = _compiled(create_block_mask)
    width = sequences.tokens
    return create(visible(sequences, window), None, None, width, width, device)


def visible(sequences: Sequences, window: int | None) -> MaskFunction:
    """Return the function that says who sees whom: prompt and own tokens, none that come later.

    Args:
        sequences: who belongs to what.
        window: a token sees itself and the `window - 1` before it in its sequence.
    """
    own, prompt = sequences.of_token, sequences.prompt_of_token
    # Tensors, where a captured number would be one more thing to compile for.
    position = sequences.positions
    earliest = torch.zeros_like(position) if window is None else position - (window - 1)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (own[key] == own[query]) | (own[key] == prompt[query])
        return related & (key <= query) & (position[key] >= earliest[query])

    return sees


def _capped(softcap: float, device: torch.device) -> ScoreFunction:
    """Return what caps scores, which are float32 there."""
    # Filled on the device: a copy would wait for it.
    cap = torch.full((), softcap, dtype=torch.float32, device=device)

    def capped(score: Tensor, _b: Tensor, _h: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for any length at once; a compilation for each new length takes many seconds.

    Whole or not at all: where a part could not be compiled, scores would be made whole instead.
    """
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return compiled(*args, **options)

    return called
