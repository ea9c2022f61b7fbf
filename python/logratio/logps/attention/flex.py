"""Attention of a whole row by FlexAttention, for cases that variable-length kernels do not support.

A block mask computed from the sequences restricts the attention, so no keys are gathered.
Soft-capping is a score function. On a GPU, FlexAttention is compiled on first use.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from logratio.logps.sequences import Row

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Returns whether a query (third argument) may see a key (fourth), both positions in the row."""

ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""For rows of fewer than 128 tokens torch uses a decoding kernel, which fails if the tokens times
the query heads per key head exceed its tile. This option disables it."""

VARIANTS = 64
"""Limit of recompilations; torch's default is eight. A model needs four to seven variants (with and
without gradients, one or several tiles, dtypes), and a process may have several models."""


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Row,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend within each sequence: `[1, H, T, D]` to `[1, T, H, D]`.

    On the CPU it has no backward pass, and materializes all `[T, T]` scores.

    Args:
        query: Queries `[1, H, T, D]`.
        key: Keys `[1, Hk, T, D]`; `Hk` divides `H`.
        value: Values `[1, Hk, T, Dv]`.
        sequences: Sequences of the row, or runs of its tree.
        scaling: Scale of the scores; None: `D ** -0.5`.
        window: A token sees itself and the `window - 1` tokens before it; None: all before it.
        softcap: Cap of the scores; None: no cap.
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


def block_mask(sequences: Row, window: int | None) -> BlockMask:
    """Create the block mask of a row of `T` tokens, on the device of `sequences`."""
    device = sequences.key_index.device
    create: Callable[..., BlockMask] = create_block_mask
    if device.type == "cuda":
        create = _compiled(create_block_mask)
    width = sequences.tokens
    return create(visible(sequences, window), None, None, width, width, device)


def visible(sequences: Row, window: int | None) -> MaskFunction:
    """Return the mask function: a token sees what its sequence begins with, up to itself.

    Args:
        sequences: Sequences of the row, or runs of its tree.
        window: A token sees itself and the `window - 1` tokens before it; None: all before it.
    """
    # Captured as tensors: torch.compile would specialize on a captured number.
    position, ends = sequences.positions, sequences.ends
    earliest = torch.zeros_like(position) if window is None else position - (window - 1)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key]) & (position[key] >= earliest[query])

    return sees


def _capped(softcap: float, device: torch.device) -> ScoreFunction:
    """Return a score function that caps scores, which are float32."""
    # Filled on the device, because a copy from the host would synchronize.
    cap = torch.full((), softcap, dtype=torch.float32, device=device)

    def capped(score: Tensor, _b: Tensor, _h: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for dynamic lengths, since recompiling for each length takes many seconds.

    With `fullgraph`, a failure raises an error; a graph break would materialize all scores.
    """
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return compiled(*args, **options)

    return called
