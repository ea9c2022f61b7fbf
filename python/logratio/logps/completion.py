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

from logratio.logps.attention.interface import NAME, SharedPromptError, shared_prompts
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.tree import SharedTree
from logratio.logps.batch import Batch, PaddedBatch, TreeBatch
from logratio.logps.head import TILE_ELEMENTS, Head, head_logits, tile_rows
from logratio.logps.head_loss import LossOf, head_logps, head_loss
from logratio.logps.splitting import apart, in_order, limits_of, with_fresh_rope


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
        batch: `G` groups in any layout, `S` completion tokens.

    Returns:
        float32 `[S]`, flat and group-major as `batch.targets`, in nats; differentiable.

    Raises:
        SharedPromptError: the batch is shared and the model is not ready for it.
    """
    inner, target_ids = transformer(model), batch.targets.target_ids
    hidden = _target_states(inner, batch)
    if (head := Head.of(inner)) is None:
        return _module_logps(inner, hidden, target_ids)
    return head_logps(head, hidden, target_ids)


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Return `completion_logps`, in the attention that the batch's layout needs."""
    if isinstance(batch, PaddedBatch):
        return completion_logps(model, batch)
    with shared_prompts(transformer(model)):
        return completion_logps(model, batch)


def _target_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the body, in as many calls as it needs; return the states that predict the targets."""
    limits = limits_of(model.config)
    calls, is_kept = apart(batch, limits), any(limit.is_kept for limit in limits)
    return in_order([_states_of_call(model, call.batch, is_kept) for call in calls], calls)


def _states_of_call(model: PreTrainedModel, batch: Batch, is_kept: bool) -> Tensor:
    if is_kept:
        with_fresh_rope(model)
    states = _hidden_states(model, batch).flatten(0, 1)
    return states.index_select(0, batch.targets.logit_index)


def _hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Run the body, without its head: `[rows, T, H]`."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    takes_positions = "position_ids" in signature(model.base_model.forward).parameters
    if not isinstance(batch, PaddedBatch):
        if not takes_positions:
            raise SharedPromptError("it numbers the tokens of a row itself, and takes no positions")
        if model.config._attn_implementation != NAME:
            raise SharedPromptError("a shared batch needs the model inside shared_prompts(model)")
        inputs["shared_prompt"] = (
            SharedTree(batch) if isinstance(batch, TreeBatch) else SharedPrompt(batch)
        )
        inputs["position_ids"] = batch.position_ids
        # Without a mask, transformers reads positions to see whether sequences lie end to end.
        inputs["attention_mask"] = torch.ones_like(batch.input_ids, dtype=torch.bool)
    else:
        inputs["attention_mask"] = batch.attention_mask
        if takes_positions:
            inputs["position_ids"] = batch.position_ids
    hidden = model.base_model(**inputs)[0]
    assert isinstance(hidden, Tensor)
    return hidden


def completion_loss(model: nn.Module, batch: Batch, loss_of: LossOf) -> Tensor:
    """Make a loss of `batch`'s log-probs: the cheapest way to its gradients.

    Args:
        model: as in `completion_logps`.
        batch: as in `completion_logps`.
        loss_of: from the log-probs, float32 `[s]`, of a part of the batch (whole groups) to its
            share of the loss, a scalar. It is called once for each part, while gradients of the
            log-probs are recorded; what else it returns it may keep.

    Returns:
        The sum over the parts, a scalar; differentiable.

    Raises:
        SharedPromptError: as in `completion_logps`.
    """
    inner, targets = transformer(model), batch.targets
    hidden = _target_states(inner, batch)
    head = Head.of(inner)
    if head is None:
        return loss_of(_module_logps(inner, hidden, targets.target_ids), targets.whole)
    parts = targets.parts(tile_rows(head))
    return head_loss(head, hidden, targets.target_ids, parts, loss_of)


def _module_logps(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """Apply a head that is more than a matrix, in tiles that the backward pass makes again."""
    rows = max(1, TILE_ELEMENTS // model.config.get_text_config().vocab_size)
    tiles = zip(hidden.split(rows), target_ids.split(rows), strict=True)
    return torch.cat(
        [checkpoint(_module_tile_logps, model, h, t, use_reentrant=False) for h, t in tiles]
    )


def _module_tile_logps(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    return -cross_entropy(head_logits(model, hidden).float(), target_ids, reduction="none")
