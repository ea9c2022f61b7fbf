"""Attention for groups that lie end to end: every completion sees its prompt and itself.

Registered with transformers' attention interface, so no model file is patched: a model whose
implementation is `NAME` hands its queries, keys and values to `shared_prompt_attention`, together
with the `SharedPrompt` that `completion_logps` passes to the model as a keyword.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from logratio.logps.attention.fused import attend_fused
from logratio.logps.attention.kernels import KernelError
from logratio.logps.attention.sdpa import attend
from logratio.logps.attention.segments import SharedPrompt

NAME = "logratio_shared_prompt"


class SharedPromptError(ValueError):
    """The model's attention cannot keep the completions of a group apart."""


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: SharedPrompt | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`.

    Raises:
        SharedPromptError: the model did not pass `shared_prompt` on, or asks for something
            (attention sinks, soft-capping without a kernel for it) that this attention does not do.
    """
    _refuse_unknown(shared_prompt, options)
    assert shared_prompt is not None
    window, states = sliding_window, (query, key, value, shared_prompt)
    try:
        out = attend_fused(
            *states, scaling=scaling, dropout=dropout, window=window, softcap=softcap
        )
    except KernelError as error:
        raise SharedPromptError(str(error)) from error
    if out is None:
        _refuse_unknown(shared_prompt, {"softcap": softcap})
        out = attend(*states, scaling=scaling, dropout=dropout, window=window)
    return out, None


def _refuse_unknown(shared_prompt: SharedPrompt | None, options: dict[str, Any]) -> None:
    if shared_prompt is None:
        raise SharedPromptError("the model does not pass keywords on to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise SharedPromptError(f"the model's attention uses {name}")


def _no_mask(*_args: Any, **_options: Any) -> None:
    """Answer transformers' request for a mask: `SharedPrompt` builds its own."""


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
        yield
    finally:
        model.set_attn_implementation(before)
