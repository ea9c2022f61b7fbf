"""Shared-prompt attention, registered with transformers' attention interface.

Groups are concatenated in one row, and every completion sees its prompt and itself. No model code
is patched: a model whose attention implementation is `NAME` calls `shared_prompt_attention` with
its queries, keys and values, and with the `SharedPrompt` that `completion_logps` passes to the
model as a keyword argument.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from logratio.errors import LogratioError
from logratio.logps.attention.fused import attend_fused, kernel_of
from logratio.logps.attention.kernels import TRACED, KernelError
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.sdpa import Scoring, attend
from logratio.logps.attention.split import attend_split
from logratio.logps.attention.tree import SharedTree, attend_tree
from logratio.logps.context_parallel import SplitBatch
from logratio.logps.sequences import Sequences

NAME = "logratio_shared_prompt"
HARMLESS = ("position_ids", "cache_position")
"""Tensors that models pass to every attention function, and that do not affect scores."""


class SharedPromptError(LogratioError, ValueError):
    """The model's attention cannot separate the completions of a group."""


SharedRow = SharedPrompt | SharedTree | SplitBatch
"""What a model passes to its attention about a row."""


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: SharedRow | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`.

    Args:
        module: The calling attention layer (unused).
        query: Queries `[1, H, T, D]`.
        key: Keys `[1, Hk, T, D]`; `Hk` divides `H`.
        value: Values `[1, Hk, T, Dv]`.
        attention_mask: Result of `_no_mask`.
        shared_prompt: Positions of prompts and completions in the row; or what this process has
            of it.
        scaling: Scale of the scores; None: `D ** -0.5`.
        dropout: Dropout probability of the attention weights.
        sliding_window: A token sees itself and the `sliding_window - 1` tokens before it.
        softcap: Cap of the scores (Gemma 2).
        s_aux: Attention sinks `[H]` (gpt-oss).
        **options: Further arguments of the model; tensors among them are refused.

    Returns:
        The output, and None in place of attention weights.

    Raises:
        SharedPromptError: The model does not pass `shared_prompt` to its attention, or needs a
            feature that this attention lacks: a position bias, a selection of keys, or a window
            that only its mask contains.
    """
    _refuse_unknown(shared_prompt, options)
    _refuse_mask(attention_mask, sliding_window)
    assert shared_prompt is not None
    scoring = Scoring(scaling, dropout, sliding_window, softcap, s_aux)
    try:
        if isinstance(shared_prompt, SplitBatch):
            return attend_split(query, key, value, shared_prompt, scoring), None
        out = attend_fused(query, key, value, shared_prompt, scoring)
    except KernelError as error:
        raise SharedPromptError(str(error)) from error
    if out is not None:
        return out, None
    if isinstance(shared_prompt, SharedTree):
        return attend_tree(query, key, value, shared_prompt, scoring), None
    return attend(query, key, value, shared_prompt, scoring), None


def attention_in_graph(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: SharedRow | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend like `shared_prompt_attention`, in layers that are compiled.

    Kernels of torch that compute a row in one call or two become a part of a layer's graph, after
    `prepare` of the row. For other kernels the graph is interrupted: attention group by group would
    need a graph for each batch, FlexAttention has a graph of its own, and other packages need not
    support tracing. So do trees, because the number of sums over copied keys depends on the tree.
    """
    attend: Callable[..., tuple[Tensor, None]] = _outside
    whole = None if isinstance(shared_prompt, SplitBatch) else shared_prompt
    if whole is not None and isinstance(whole.sequences, Sequences):
        names = ("scaling", "softcap", "sliding_window", "dropout", "s_aux")
        scaling, softcap, window, dropout, sinks = (options.get(name) for name in names)
        scoring = Scoring(scaling, dropout or 0.0, window, softcap, sinks)
        if kernel_of(query, key, value, whole, scoring) in TRACED:
            attend = shared_prompt_attention
    return attend(module, query, key, value, attention_mask, shared_prompt=shared_prompt, **options)


_outside = torch.compiler.disable(shared_prompt_attention)


def _refuse_unknown(
    shared_prompt: SharedRow | None,
    options: dict[str, Any],
) -> None:
    if shared_prompt is None:
        raise SharedPromptError("the model does not pass keyword arguments to its attention")
    for name, value in options.items():
        if isinstance(value, Tensor) and name not in HARMLESS:
            raise SharedPromptError(
                f"its attention takes {name}, which shared-prompt attention does not support"
            )


def _refuse_mask(asked: Tensor | None, window: int | None) -> None:
    """Refuse a layer whose mask restricts the attention in a way that its arguments do not.

    The leak check cannot detect a missing window, because its probe is shorter than most windows.
    """
    if asked is not None and asked.numel():
        raise SharedPromptError("the model builds its attention masks itself")
    reach = None if asked is None else asked.shape[0]
    if reach != window:
        raise SharedPromptError(f"the window of its mask is {reach}, of its attention {window}")


def _no_mask(
    *_args: Any, local_size: int | None = None, device: Any = None, **_options: Any
) -> Tensor | None:
    """Return the window of a mask that transformers requests, as the shape of an empty tensor.

    The masks themselves come from `SharedPrompt`. Models pass masks on as tensors, so the window is
    encoded in the shape `[window, 1, 1, 0]`, which can be read without a device synchronization.
    """
    return None if local_size is None else torch.empty(local_size, 1, 1, 0, device=device)


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def shared_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Use shared-prompt attention in `model` inside the block, and restore its attention after it.

    Raises:
        SharedPromptError: The model's attention cannot be replaced.
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
        if model.config._attn_implementation != NAME:  # transformers only logs a warning
            raise SharedPromptError("its attention is custom code and cannot be replaced")
        _REPLACED[model] = before
        yield
    finally:
        _REPLACED.pop(model, None)
        model.set_attn_implementation(before)


_REPLACED: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Models inside a block of `shared_prompts`, with their own attention."""


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use the model's own attention, for example to generate, also inside `shared_prompts`."""
    before = _REPLACED.get(model)
    if before is None:
        yield
        return
    model.set_attn_implementation(before)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)
