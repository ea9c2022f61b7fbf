"""Attention for groups that lie end to end: every completion sees its prompt and itself.

Registered with transformers' attention interface, so no model file is patched: a model whose
implementation is `NAME` hands its queries, keys and values to `shared_prompt_attention`, together
with the `SharedPrompt` that `completion_logps` passes to the model as a keyword.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from logratio.errors import LogratioError
from logratio.logps.attention.fused import attend_fused
from logratio.logps.attention.kernels import KernelError
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.sdpa import Scoring, attend
from logratio.logps.attention.tree import SharedTree, attend_tree

NAME = "logratio_shared_prompt"
HARMLESS = ("position_ids", "cache_position")
"""Tensors that models hand to every attention, and that change no score."""


class SharedPromptError(LogratioError, ValueError):
    """The model's attention cannot keep the completions of a group apart."""


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: SharedPrompt | SharedTree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`.

    Raises:
        SharedPromptError: the model did not pass `shared_prompt` on, or asks for something
            (a position bias, a choice of keys, a window that only its mask has) that this attention
            does not do.
    """
    _refuse_unknown(shared_prompt, options)
    _refuse_mask(attention_mask, sliding_window)
    assert shared_prompt is not None
    scoring = Scoring(scaling, dropout, sliding_window, softcap, s_aux)
    try:
        out = attend_fused(query, key, value, shared_prompt, scoring)
    except KernelError as error:
        raise SharedPromptError(str(error)) from error
    if out is not None:
        return out, None
    if isinstance(shared_prompt, SharedTree):
        return attend_tree(query, key, value, shared_prompt, scoring), None
    return attend(query, key, value, shared_prompt, scoring), None


def _refuse_unknown(
    shared_prompt: SharedPrompt | SharedTree | None,
    options: dict[str, Any],
) -> None:
    if shared_prompt is None:
        raise SharedPromptError("the model does not pass keywords on to its attention")
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in HARMLESS:
            raise SharedPromptError(
                f"its attention takes {name}, which that of shared prompts does not know"
            )


def _refuse_mask(asked: Tensor | None, window: int | None) -> None:
    """Refuse a layer whose mask is to say something that its attention does not say itself.

    The probe of the leak check is shorter than most windows, so that it would not see this.
    """
    if asked is not None and asked.numel():
        raise SharedPromptError("the model makes masks of its own")
    reach = None if asked is None else asked.shape[0]
    if reach != window:
        raise SharedPromptError(f"its mask has a window of {reach}, its attention one of {window}")


def _no_mask(
    *_args: Any, local_size: int | None = None, device: Any = None, **_options: Any
) -> Tensor | None:
    """Answer transformers' request for a mask with its window alone: `SharedPrompt` masks.

    Models hand masks on as tensors, so a window travels as the shape of one that holds nothing:
    `[window, 1, 1, 0]`, which no device has to be waited for to read.
    """
    return None if local_size is None else torch.empty(local_size, 1, 1, 0, device=device)


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def shared_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` use shared-prompt attention inside the block, its own again after it.

    Raises:
        SharedPromptError: the model has no attention that can be replaced.
    """
    before = model.config._attn_implementation
    if before == NAME:  # nested: the outer block restores it
        yield
        return
    try:
        model.set_attn_implementation(NAME)
    except (AttributeError, ValueError) as error:
        raise SharedPromptError(f"its attention cannot be replaced ({error})") from error
    try:
        if model.config._attn_implementation != NAME:  # transformers logs that, and raises nothing
            raise SharedPromptError("its attention is custom code, which cannot be replaced")
        yield
    finally:
        model.set_attn_implementation(before)
