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
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from logratio.training.tensors import SharedBatch

NAME = "logratio_shared_prompt"


class SharedPromptError(ValueError):
    """The model's attention cannot keep the completions of a group apart."""


class SharedPrompt:
    """Where each prompt and completion lies in the row, and the masks that follow from it."""

    def __init__(self, batch: SharedBatch) -> None:
        tokens = sum(batch.prompt_lengths) + sum(map(sum, batch.completion_lengths))
        filler = (
            batch.input_ids.shape[1] - tokens
        )  # up to a fixed width: a prompt that none answers
        self.prompts = batch.prompt_lengths + [filler] * (filler > 0)
        self.completions = batch.completion_lengths + [[]] * (filler > 0)
        self.answers = [sum(lengths) for lengths in self.completions]
        self.groups = [p + a for p, a in zip(self.prompts, self.answers, strict=True)]
        self.queries = [n for pair in zip(self.prompts, self.answers, strict=True) for n in pair]
        self.positions = batch.position_ids[0].split(self.groups)
        self._masks: dict[int | None, list[tuple[Tensor | None, Tensor]]] = {}

    def masks(self, window: int | None) -> list[tuple[Tensor | None, Tensor]]:
        """Return each group's (prompt mask, answer mask) for a sliding `window`, or none.

        Bool, True where a query (row) may see a key (column): `[P, P]`, or None where plain
        causal attention says the same, and `[C, P + C]` with `C` the tokens of all completions.
        """
        if window not in self._masks:
            self._masks[window] = [self._group_masks(g, window) for g in range(len(self.groups))]
        return self._masks[window]

    def _group_masks(self, group: int, window: int | None) -> tuple[Tensor | None, Tensor]:
        positions, prompt = self.positions[group], self.prompts[group]
        visible = positions[:, None] >= positions[None]
        if window is not None:
            visible &= positions[:, None] - positions[None] < window
        owner = _owners(prompt, self.completions[group], positions.device)
        visible &= (owner[None] == 0) | (owner[:, None] == owner[None])
        causal = window is None or window >= prompt
        return (None if causal else visible[:prompt, :prompt]), visible[prompt:]


def _owners(prompt: int, completions: list[int], device: torch.device) -> Tensor:
    """Number the parts of a group's tokens: 0 for the prompt, k for completion k."""
    lengths = torch.tensor([prompt, *completions], device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)


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
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each group of the row: `[1, H, T, D]` to `[1, T, H, D]`.

    Raises:
        SharedPromptError: the model did not pass `shared_prompt` on, or asks for something
            (soft-capping, attention sinks) that this attention does not do.
    """
    _refuse_unknown(shared_prompt, options)
    assert shared_prompt is not None
    heads = query.shape[1] // key.shape[1]
    queries = query.split(shared_prompt.queries, dim=2)
    keys = _repeated(key, heads).split(shared_prompt.groups, dim=2)
    values = _repeated(value, heads).split(shared_prompt.groups, dim=2)
    out = []
    for group, (prompt_mask, answer_mask) in enumerate(shared_prompt.masks(sliding_window)):
        prompt, k, v = shared_prompt.prompts[group], keys[group], values[group]
        out.append(
            scaled_dot_product_attention(
                queries[2 * group],
                k[:, :, :prompt],
                v[:, :, :prompt],
                attn_mask=prompt_mask,
                is_causal=prompt_mask is None,
                dropout_p=dropout,
                scale=scaling,
            )
        )
        out.append(
            scaled_dot_product_attention(
                queries[2 * group + 1], k, v, answer_mask, dropout_p=dropout, scale=scaling
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2), None


def _refuse_unknown(shared_prompt: SharedPrompt | None, options: dict[str, Any]) -> None:
    if shared_prompt is None:
        raise SharedPromptError("the model does not pass keywords on to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise SharedPromptError(f"the model's attention uses {name}")


def _repeated(heads: Tensor, times: int) -> Tensor:
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


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
