"""Scores of completions under a reward model: a body with a scalar head.

The head is `score` of transformers' classes for sequence classification with one label. As there, a
sequence is scored at its last token that is not the padding token of the model's config.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from logratio.logps.batch import Batch, PaddedBatch, SharedBatch
from logratio.logps.completion import (
    Call,
    Routed,
    attention_for,
    completion_logps,
    inside,
    states_at,
    transformer,
)
from logratio.logps.head import active_layer
from logratio.logps.head_loss import LossOf
from logratio.logps.sequences import onto

HEAD = "score"
"""Name of the head in transformers' classes."""


def has_scalar_head(model: nn.Module) -> bool:
    """Return whether a model of transformers, or the one in a peft wrapper, is a reward model."""
    return "ForSequenceClassification" in type(transformer(model)).__name__


def completion_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Score every completion of `batch`: the head's output at its last token.

    Args:
        model: A reward model, or a peft wrapper around one. For a shared or tree batch, call this
            inside `attention.shared_prompts(model)`, or use `score_completions`.
        batch: `G` groups in any layout, with `N` completions.

    Returns:
        Scores, `[N]`, in the order of `batch.targets.rows`; differentiable. The head multiplies in
        float32 (float64 for a model in float64) in every precision, since bfloat16 has no digits
        for small differences between large scores.

    Raises:
        SharedPromptError: The batch is shared and the model does not use shared-prompt attention.
    """
    return inside(model, _scores, batch)


def score_completions(model: nn.Module, batch: Batch) -> Tensor:
    """Return `completion_scores`, with shared-prompt attention if the layout needs it: `[N]`.

    Raises:
        SharedPromptError: The model does not support the batch's layout: see `choose_layout`.
    """
    with attention_for(model, batch):
        return completion_scores(model, batch)


def score_loss(
    model: nn.Module, batch: Batch, loss_of: LossOf, routed: Routed | None = None
) -> Tensor:
    """Compute a loss of `batch`'s scores, as `completion_loss` does one of log-probs.

    Args:
        model: As in `completion_scores`.
        batch: As in `completion_scores`.
        loss_of: Maps the scores `[N]` to the loss, a scalar.
        routed: As in `completion_loss`.

    Returns:
        The loss, a scalar; differentiable.

    Raises:
        SharedPromptError: As in `completion_scores`.
    """

    def loss(model: nn.Module) -> Tensor:
        return loss_of(_scores(model, batch, routed), batch.targets.whole)

    return inside(model, loss)


def differentiable_values(model: nn.Module, batch: Batch) -> Tensor:
    """Return what a loss of this model takes: scores `[N]`, or log-probs of tokens `[S]`."""
    of = completion_scores if has_scalar_head(model) else completion_logps
    return of(model, batch)


def _scores(model: nn.Module, batch: Batch, routed: Routed | None = None) -> Tensor:
    inner = transformer(model)
    states = end_states(inner, batch, routed)
    head = active_layer(getattr(inner, HEAD))
    kind = torch.promote_types(states.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(kind)
    with torch.autocast(states.device.type, enabled=False):
        return linear(states.to(kind), head.weight.to(kind), bias)[:, 0]


def end_states(model: PreTrainedModel, batch: Batch, routed: Routed | None = None) -> Tensor:
    """Return the hidden state at which each completion is scored, `[N, H]`."""
    pad = model.config.get_text_config().pad_token_id
    states, calls = states_at(model, batch, lambda call: scored_places(call, pad), routed)
    if len(calls) == 1:
        return states[0]
    owners = np.concatenate([_completions_of(call, batch) for call in calls])
    order = torch.from_numpy(np.argsort(owners))
    return torch.cat(states).index_select(0, order.to(states[0].device))


def _completions_of(call: Call, batch: Batch) -> np.ndarray:
    """Return the numbers of a call's completions in the whole batch, ascending."""
    ends = batch.targets.completion_offsets[1:]
    return np.unique(np.searchsorted(ends, call.targets_at, side="right"))


def scored_places(batch: Batch, pad: int | None) -> Tensor:
    """Return the position in the flattened batch at which each completion is scored, int64 `[N]`.

    Args:
        batch: The batch.
        pad: The padding token of the model's config: the last token with another id is scored. If
            a completion has no other, this is the last token of its prompt.
    """
    ends, targets = _last_places(batch), batch.targets
    if pad is None:
        return ends
    offsets = onto(targets.completion_offsets.astype(np.int64), ends.device)
    numbers = torch.arange(len(targets.target_ids), device=ends.device)
    kept = torch.where(targets.target_ids != pad, numbers, -1)
    last = (offsets[:-1] - 1).scatter_reduce(0, targets.completion_of, kept, "amax")
    # The token after the last one that counts is predicted at the position of that one.
    before = targets.logit_index[(last + 1).clamp(max=len(numbers) - 1)]
    return torch.where(last + 1 == offsets[1:], ends, before)


def _last_places(batch: Batch) -> Tensor:
    """Return the position of each completion's last token, int64 `[N]`."""
    if isinstance(batch, PaddedBatch):
        width = batch.attention_mask.shape[1]
        ends = width - 1 - batch.attention_mask.flip(1).argmax(1)
        first = onto(batch.targets.completion_offsets[:-1].astype(np.int64), ends.device)
        rows = batch.targets.logit_index[first] // width
        return rows * width + ends[rows]
    found = _of_shared(batch) if isinstance(batch, SharedBatch) else batch.last_tokens
    return onto(found, batch.input_ids.device)


def _of_shared(batch: SharedBatch) -> np.ndarray:
    groups = zip(batch.prompt_lengths, batch.completion_lengths, strict=True)
    lengths = [(prompt, *completions) for prompt, completions in groups]
    ends = np.cumsum(np.concatenate(lengths)) - 1
    is_completion = np.concatenate([np.arange(len(one)) > 0 for one in lengths])
    found: np.ndarray = ends[is_completion].astype(np.int64)
    return found
