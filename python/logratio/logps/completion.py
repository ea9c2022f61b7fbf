"""The only place where log-probs are made.

Knows tensors and a model; knows nothing of configs, files or losses.
"""

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from logratio.logps.attention import NAME, SharedPrompt, SharedPromptError, shared_prompts
from logratio.logps.tensors import Batch, SharedBatch

TILE_ELEMENTS = 2**24
"""Logits held at a time: 64 MiB in float32, so `[T, V]` never exists whole."""


def transformer(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a peft wrapper, or the model itself."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    return inner


def completion_logps(model: nn.Module, batch: Batch) -> Tensor:
    """Score every completion token of `batch`: `log p(token | prompt, tokens before it)`.

    Args:
        model: a causal language model of transformers, or a peft wrapper around one. A shared
            batch needs it inside `attention.shared_prompts(model)`.
        batch: `G` groups in either layout, `S` completion tokens.

    Returns:
        float32 `[S]`, flat and group-major as `batch.targets`, in nats; differentiable.

    Raises:
        SharedPromptError: the batch is shared and the model is not ready for it.
    """
    inner = transformer(model)
    hidden = _hidden_states(inner, batch).flatten(0, 1)
    targets = batch.targets
    return _head_logps(inner, hidden.index_select(0, targets.logit_index), targets.target_ids)


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Return `completion_logps`, in the attention that the batch's layout needs."""
    if not isinstance(batch, SharedBatch):
        return completion_logps(model, batch)
    with shared_prompts(transformer(model)):
        return completion_logps(model, batch)


def _hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the body, without its head: `[rows, T, H]`."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if isinstance(batch, SharedBatch):
        if model.config._attn_implementation != NAME:
            raise SharedPromptError("a shared batch needs the model inside shared_prompts(model)")
        inputs["shared_prompt"] = SharedPrompt(batch)
        inputs["position_ids"] = batch.position_ids
    else:
        inputs["attention_mask"] = batch.attention_mask
        if "position_ids" in signature(model.base_model.forward).parameters:
            inputs["position_ids"] = batch.position_ids
    hidden = model.base_model(**inputs)[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _head_logps(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """Apply the head in tiles of positions, each recomputed in the backward pass."""
    rows = max(1, TILE_ELEMENTS // model.config.get_text_config().vocab_size)
    tiles = zip(hidden.split(rows), target_ids.split(rows), strict=True)
    if torch.is_grad_enabled() and len(target_ids) > rows:
        scored = [checkpoint(_tile_logps, model, h, t, use_reentrant=False) for h, t in tiles]
    else:
        scored = [_tile_logps(model, h, t) for h, t in tiles]
    return torch.cat(scored)


def _tile_logps(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    logits = head_logits(model, hidden).float()
    return -cross_entropy(logits, target_ids, reduction="none")


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the head as the model's own forward does: `[n, H]` to `[n, V]`.

    Knows the scalings that model families put after the head; `checks.check_head` compares the
    result with the model's own logits, so a family that is missing here is refused, not guessed.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    logits: Tensor = head(hidden)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    return logits
