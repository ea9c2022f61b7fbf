"""Hidden states of candidates: after a prompt that is computed once, or in rows of their own."""

from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from logratio.bundle import PADDED
from logratio.export.families import layout_of
from logratio.export.traceable import traceable


class CandidateInputs(NamedTuple):
    """The graph's inputs, int64, as filled by `_rust.candidate_layout`.

    `G` prompts of up to `P` tokens and `N` candidates of up to `C`; the head runs on `K` chunks.

    Attributes:
        prompt_ids: `[G, P]`, left-padded.
        prompt_mask: `[G, P]`, 1 on tokens.
        candidate_ids: `[N, C]`, right-padded.
        candidate_mask: `[N, C]`, 1 on tokens.
        group: `[N]`, the index of each candidate's prompt.
        token_index: `[K, chunk]`, flat index in `[N, C]` of each token to score; 0 for padding.
        token_row: `[K, chunk]`, the candidate of each token; `N` for padding.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    candidate_ids: Tensor
    candidate_mask: Tensor
    group: Tensor
    token_index: Tensor
    token_row: Tensor


def candidate_states(model: PreTrainedModel, inputs: CandidateInputs) -> tuple[Tensor, Tensor]:
    """Return hidden states in the layout of the model's family.

    Returns:
        The states at the end of each candidate's prompt `[N, 1, H]`, and of its tokens `[N, C, H]`.
    """
    layout = layout_of(model.config)
    with traceable(model):
        return (padded_states if layout == PADDED else shared_states)(model, inputs)


def shared_states(model: PreTrainedModel, inputs: CandidateInputs) -> tuple[Tensor, Tensor]:
    """Compute each prompt once for all its candidates: see `candidate_states`."""
    body: Any = model.base_model
    prompt = body(
        input_ids=inputs.prompt_ids,
        attention_mask=inputs.prompt_mask,
        position_ids=(inputs.prompt_mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=DynamicCache(),  # without a config, so that sliding layers keep all keys
        use_cache=True,
    )
    candidates = body(
        input_ids=inputs.candidate_ids,
        attention_mask=torch.cat([inputs.prompt_mask[inputs.group], inputs.candidate_mask], -1),
        position_ids=_candidate_positions(inputs),
        past_key_values=_gathered(prompt.past_key_values, inputs.group),
        use_cache=True,
    )
    return prompt.last_hidden_state[:, -1:][inputs.group], candidates.last_hidden_state


def _gathered(cache: Any, group: Tensor) -> DynamicCache:
    """Return a cache with each candidate's copy of its prompt's keys and values."""
    gathered = DynamicCache()
    for number, layer in enumerate(cache.layers):
        gathered.update(layer.keys[group], layer.values[group], number)
    return gathered


def _candidate_positions(inputs: CandidateInputs) -> Tensor:
    """Return position ids that continue from the prompt's, `[N, C]`.

    Padding gets 0, because higher numbers could exceed a learned position table.
    """
    lengths = inputs.prompt_mask.sum(-1)[inputs.group].unsqueeze(-1)
    places = torch.arange(inputs.candidate_ids.shape[1]).unsqueeze(0)
    return (lengths + places) * inputs.candidate_mask


def padded_states(model: PreTrainedModel, inputs: CandidateInputs) -> tuple[Tensor, Tensor]:
    """Compute prompt and candidate together, in a row for each candidate: see `candidate_states`.

    All padding is on the right, where no token of a causal model depends on it.
    """
    prompts, group = inputs.prompt_mask[inputs.group], inputs.group
    lengths = prompts.sum(1, keepdim=True)
    ids = torch.cat([inputs.prompt_ids[group], inputs.candidate_ids], 1)
    mask = torch.cat([prompts, inputs.candidate_mask], 1)
    places = torch.arange(ids.shape[1]).unsqueeze(0)
    sources = places + prompts.shape[1] - lengths  # skips the prompt's padding
    inside = sources < ids.shape[1]
    sources = sources.clamp(max=ids.shape[1] - 1)
    mask = mask.gather(1, sources) * inside
    body: Any = model.base_model
    # Most families count positions themselves, but then in one row for all sequences, with which
    # ONNX Runtime's rotary embedding fails.
    counts = "position_ids" in signature(body.forward).parameters
    positions = {"position_ids": places * mask} if counts else {}
    rows = {"input_ids": ids.gather(1, sources), "attention_mask": mask}
    states = body(**rows, **positions, use_cache=False)[0]
    answers = torch.arange(inputs.candidate_ids.shape[1]).unsqueeze(0)
    return _rows(states, lengths - 1), _rows(states, lengths + answers)


def _rows(states: Tensor, places: Tensor) -> Tensor:
    """Return the states `[N, n, H]` at places `[N, n]` of `[N, T, H]`."""
    return states.gather(1, places.unsqueeze(2).expand(-1, -1, states.shape[2]))
