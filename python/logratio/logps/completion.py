"""Compute the log-probs of a batch, in several calls if sequences would affect each other.

All log-probs of the library are computed here.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from logratio._rust import StoreWriter
from logratio.data.feed import lay_out
from logratio.logps.attention.interface import (
    NAME,
    SharedPromptError,
    SharedRow,
    shared_prompts,
)
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.tree import SharedTree
from logratio.logps.batch import Batch, PaddedBatch, SharedBatch, TreeBatch, shape_for, to_torch
from logratio.logps.context_parallel import (
    SplitBatch,
    ranks_of,
    split,
    split_logps,
    split_loss,
)
from logratio.logps.head import TILE_ELEMENTS, Head, head_logits, tile_rows
from logratio.logps.head_loss import LossOf, head_logps, head_loss

Group = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and of each of its completions."""

Routed = Callable[[Batch, tuple[Tensor, ...] | None], None]
"""Receives a batch of one call of the body, and the logits of each layer's router, if there are."""

_LAYOUTS = {SharedBatch: "shared", TreeBatch: "tree", PaddedBatch: "padded"}

TOP_K = ("index_topk", "keep_window_size")
"""Config entries with the number of keys that attention selects: DeepSeek and GLM; Doge."""


@dataclass(frozen=True)
class Limit:
    """A length beyond which a sequence's log-probs depend on the other sequences in a call.

    Attributes:
        tokens: Sequences of at most this length do not affect each other.
        by_length: Whether longer sequences may only be batched with sequences of equal length. If
            False, all longer sequences may be batched together.
        what: Name of the model's component that causes the limit, for messages.
        is_padding_seen: Whether padding has an effect too. Prompts then cannot be shared.
        is_kept: Whether the effect persists in later calls.
    """

    tokens: int
    by_length: bool
    what: str
    is_padding_seen: bool = False
    is_kept: bool = False

    def kinds(self, lengths: np.ndarray) -> np.ndarray:
        """Return a class for each of `lengths`, int64 `[N]`; equal classes may share a call."""
        return np.where(lengths <= self.tokens, 0, lengths if self.by_length else 1)


def limits_of(config: PreTrainedConfig) -> tuple[Limit, ...]:
    """Return the limits of a model from its config; most models have none."""
    text = config.get_text_config()
    found = [_rope_limit(text, rope) for rope in ropes(text)]
    chosen = (getattr(text, name, None) for name in TOP_K)
    found += [Limit(k, True, "top-k attention", is_padding_seen=True) for k in chosen if k]
    return tuple(dict.fromkeys(limit for limit in found if limit))


def ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield the settings of each rotary embedding; some families have one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    yield from nested or [parameters]


def _rope_limit(config: PreTrainedConfig, rope: dict[str, Any]) -> Limit | None:
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings")
        return Limit(int(original or config.max_position_embeddings), False, "LongRoPE")
    if "dynamic" in kind:
        return Limit(int(config.max_position_embeddings), True, "dynamic NTK RoPE", is_kept=True)
    return None


def reset_dynamic_rope(model: nn.Module) -> None:
    """Reset dynamic NTK factors, which models otherwise keep from the longest sequence so far."""
    for module in model.modules():
        if not isinstance(getattr(module, "original_max_seq_len", None), int):
            continue
        kinds: Any = getattr(module, "rope_type", "default")
        named = kinds if isinstance(kinds, dict) else {"": kinds}
        for name in (name for name, kind in named.items() if "dynamic" in kind):
            prefix = f"{name}_" if name else ""
            original: Any = getattr(module, f"{prefix}original_inv_freq")
            now: Any = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(now.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


@dataclass(frozen=True)
class Call:
    """A part of a batch that can be computed in one call of a model.

    Attributes:
        batch: The part, as a batch.
        targets_at: Indices of its targets in the whole batch, int64 numpy `[s]`.
    """

    batch: Batch
    targets_at: np.ndarray


def split_by_limits(batch: Batch, limits: tuple[Limit, ...]) -> list[Call]:
    """Split a batch into calls that respect the limits; without a split, nothing is copied."""
    every = np.arange(len(batch.targets.target_ids))
    if not limits:
        return [Call(batch, every)]
    groups = groups_of(batch)
    lengths = np.array([len(prompt) + len(ids) for prompt, answers in groups for ids in answers])
    columns = np.stack([limit.kinds(lengths) for limit in limits], axis=1)
    kinds = np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1)
    if not kinds.any() and not _is_padded(batch, lengths, limits):
        return [Call(batch, every)]
    return [_part(batch, groups, kinds == kind) for kind in range(kinds.max() + 1)]


def _is_padded(batch: Batch, lengths: np.ndarray, limits: tuple[Limit, ...]) -> bool:
    """Return whether padding makes a row wider than a limit and than all its sequences."""
    if not isinstance(batch, PaddedBatch):
        return False
    width = batch.input_ids.shape[1]
    return width > lengths.max() and any(width > limit.tokens for limit in limits)


def _part(batch: Batch, groups: list[Group], wanted: np.ndarray) -> Call:
    """Build a batch of the wanted completions, bool `[N]`, in the same layout."""
    chosen, number = [], 0
    for prompt, completions in groups:
        own = wanted[number : number + len(completions)]
        number += len(completions)
        if own.any():
            chosen.append(
                (prompt, [ids for ids, is_own in zip(completions, own, strict=True) if is_own])
            )
    tokens = np.repeat(wanted, np.diff(batch.targets.completion_offsets))
    layout = _LAYOUTS[type(batch)]
    return Call(batch_of(chosen, layout, batch.input_ids.device), np.flatnonzero(tokens))


def groups_of(batch: Batch) -> list[Group]:
    """Return the token ids of a batch's groups, on the host."""
    targets, ids = batch.targets, batch.targets.target_ids.tolist()
    ends, numbers = targets.completion_offsets.tolist(), targets.group_offsets.tolist()
    return [
        (prompt, [ids[ends[n] : ends[n + 1]] for n in range(first, last)])
        for prompt, first, last in zip(_prompts(batch), numbers[:-1], numbers[1:], strict=True)
    ]


def _prompts(batch: Batch) -> list[list[int]]:
    if isinstance(batch, SharedBatch):
        return _shared_prompts(batch)
    return _tree_prompts(batch) if isinstance(batch, TreeBatch) else _padded_prompts(batch)


def _tree_prompts(batch: TreeBatch) -> list[list[int]]:
    targets, row = batch.targets, batch.ids_on_host
    leads = targets.completion_offsets[targets.group_offsets[:-1]]  # each group's first target
    ends = batch.targets_on_host[0][leads]
    return [row[batch.runs.path_to(end)].tolist() for end in ends.tolist()]


def _shared_prompts(batch: SharedBatch) -> list[list[int]]:
    row, prompts, start = batch.input_ids[0].tolist(), [], 0
    for length, completions in zip(batch.prompt_lengths, batch.completion_lengths, strict=True):
        prompts.append(row[start : start + length])
        start += length + sum(completions)
    return prompts


def _padded_prompts(batch: PaddedBatch) -> list[list[int]]:
    targets, width = batch.targets, batch.input_ids.shape[1]
    leads = targets.completion_offsets[targets.group_offsets[:-1]]  # each group's first target
    ends = batch.targets.logit_index.cpu().numpy()[leads]
    prompts = []
    for end in ends.tolist():
        row, stop = divmod(end, width)
        start = int(batch.attention_mask[row].argmax())  # skips padding on the left
        prompts.append(batch.input_ids[row, start : stop + 1].tolist())
    return prompts


def batch_of(groups: list[Group], layout: str, device: torch.device | str = "cpu") -> Batch:
    """Build a batch from groups of token ids, without a store file.

    Args:
        groups: Token ids of prompts and completions; all completion tokens count.
        layout: "shared", "tree" or "padded".
        device: Device of the batch.
    """
    writer = StoreWriter()
    for prompt, completions in groups:
        ids = np.array([i for completion in completions for i in completion], dtype=np.int32)
        writer.push(
            np.array(prompt, dtype=np.int32),
            ids,
            np.ones(len(ids), dtype=np.uint8),
            np.array([len(completion) for completion in completions], dtype=np.uint32),
            np.full(len(completions), 2, dtype=np.uint8),
            0,
            0,
        )
    store = writer.finish()
    rows = np.arange(len(groups), dtype=np.int64)
    return to_torch(lay_out(store, rows, layout, **shape_for(layout, device)), device)


def restore_order(states: list[Tensor], calls: list[Call]) -> Tensor:
    """Concatenate the states of each call, `[s, H]`, in the order of the whole batch: `[S, H]`."""
    if len(calls) == 1:
        return states[0]
    places = np.argsort(np.concatenate([call.targets_at for call in calls]))
    return torch.cat(states).index_select(0, torch.from_numpy(places).to(states[0].device))


ENTRANCE = "_logratio_pass"
"""Name of the method of a sharded model that runs a pass over body and head: see `inside`."""
Result = TypeVar("Result")


def inside(model: nn.Module, job: Callable[..., Result], *given: Any) -> Result:
    """Return `job(model, *given)`, run where a sharded model has gathered its head's weight.

    FSDP gathers weights around a forward pass. A pass over body and head is not the model's own
    forward, so `training.parallel.sharding` registers a method for it, which other models lack.
    """
    root = vars(transformer(model))
    enter = root.pop(ENTRANCE, None)  # passes inside a pass go on without it
    if enter is None:
        return job(model, *given)
    try:
        result: Result = enter(job, model, *given)
    finally:
        root[ENTRANCE] = enter
    return result


def transformer(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a peft wrapper, or the model itself."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    return inner


def completion_logps(model: nn.Module, batch: Batch) -> Tensor:
    """Score every completion token of `batch`: `log p(token | prompt, tokens before it)`.

    Args:
        model: A causal language model of transformers, or a peft wrapper around one. For a shared
            or tree batch, call this inside `attention.shared_prompts(model)`, or use `score`.
        batch: `G` groups in any layout, with `S` completion tokens.

    Returns:
        Log-probs in nats, float32 `[S]`, flat and group-major like `batch.targets`;
        differentiable.

    Raises:
        SharedPromptError: The batch is shared and the model does not use shared-prompt attention.

    Example:
        >>> model = load_model("sft-model")
        >>> batch = batch_of([([1, 5, 9], [[7, 2], [8, 8, 2]])], "padded")
        >>> batch.targets.sums(completion_logps(model, batch)).shape
        torch.Size([2])
    """
    return inside(model, _logps, batch)


def _logps(model: nn.Module, batch: Batch) -> Tensor:
    inner, target_ids = transformer(model), batch.targets.target_ids
    if own := _own_share(inner, batch):
        return split_logps(own, *_split_states(inner, own))
    hidden = target_states(inner, batch)
    if (head := Head.of(inner)) is None:
        return _module_logps(inner, hidden, target_ids)
    return head_logps(head, hidden, target_ids)


def score(model: nn.Module, batch: Batch) -> Tensor:
    """Return `completion_logps(model, batch)`, with shared-prompt attention if the layout needs it.

    Args:
        model: A causal language model of transformers, or a peft wrapper around one.
        batch: A batch in any layout.

    Returns:
        Log-probs in nats, float32 `[S]`; differentiable.

    Raises:
        SharedPromptError: The model does not support the batch's layout: see `choose_layout`.
    """
    with attention_for(model, batch):
        return completion_logps(model, batch)


def attention_for(model: nn.Module, batch: Batch) -> AbstractContextManager[None]:
    """Return the context in which `model` has the attention that the layout of `batch` needs."""
    if isinstance(batch, PaddedBatch):
        return nullcontext()
    return shared_prompts(transformer(model))


@torch.no_grad()
def route(model: nn.Module, batch: Batch, routed: Routed) -> None:
    """Run the body of a mixture of experts for its routers only, without gradients.

    Args:
        model: As in `completion_logps`.
        batch: As in `completion_logps`.
        routed: Called once per call of the body.

    Raises:
        SharedPromptError: As in `completion_logps`.
    """
    inside(model, lambda model: target_states(transformer(model), batch, routed))


def _own_share(model: PreTrainedModel, batch: Batch) -> SplitBatch | None:
    """Return what this process computes of a batch that several compute together, else None."""
    ranks = ranks_of(model)
    return split(batch, ranks) if ranks and isinstance(batch, SharedBatch) else None


def _split_states(model: PreTrainedModel, batch: SplitBatch) -> tuple[Head, Tensor]:
    """Return the head, and the hidden states that predict this process's targets, `[s, H]`."""
    head = Head.of(model)
    assert head is not None  # refused by `checks.split_refusal`
    return head, _hidden_states(model, batch)[0].index_select(0, batch.logit_index)


def target_states(model: PreTrainedModel, batch: Batch, routed: Routed | None = None) -> Tensor:
    """Run the body in as many calls as needed; return the hidden states that predict targets."""
    states, calls = states_at(model, batch, lambda call: call.targets.logit_index, routed)
    return restore_order(states, calls)


def states_at(
    model: PreTrainedModel,
    batch: Batch,
    places: Callable[[Batch], Tensor],
    routed: Routed | None = None,
) -> tuple[list[Tensor], list[Call]]:
    """Run the body in as many calls as needed; return hidden states of each, and the calls.

    Args:
        model: The model, without a peft wrapper.
        batch: The batch.
        places: Returns the positions of the wanted states in the flattened batch of a call.
        routed: Called once per call.

    Returns:
        Hidden states `[n, H]` of each call; and the calls.
    """
    limits = limits_of(model.config)
    calls, is_kept = split_by_limits(batch, limits), any(limit.is_kept for limit in limits)
    states = []
    for call in calls:
        if is_kept:
            reset_dynamic_rope(model)
        hidden = _hidden_states(model, call.batch, routed).flatten(0, 1)
        states.append(hidden.index_select(0, places(call.batch)))
    return states, calls


def _hidden_states(
    model: PreTrainedModel, batch: Batch | SplitBatch, routed: Routed | None = None
) -> Tensor:
    """Run the body without the head: `[rows, T, H]`."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    takes_positions = "position_ids" in signature(model.base_model.forward).parameters
    if not isinstance(batch, PaddedBatch):
        if not takes_positions:
            raise SharedPromptError("its forward takes no position_ids")
        if model.config._attn_implementation != NAME:
            raise SharedPromptError("a shared batch must be scored inside shared_prompts(model)")
        inputs["shared_prompt"] = _row_of(batch)
        inputs["position_ids"] = batch.position_ids
        # Without a mask, transformers looks for packed sequences in the positions.
        inputs["attention_mask"] = torch.ones_like(batch.input_ids, dtype=torch.bool)
    else:
        inputs["attention_mask"] = batch.attention_mask
        if takes_positions:
            inputs["position_ids"] = batch.position_ids
    if routed:
        inputs["output_router_logits"] = True
    output = model.base_model(**inputs)
    if routed:
        assert not isinstance(batch, SplitBatch)
        routed(batch, getattr(output, "router_logits", None))
    hidden = output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def _row_of(batch: SharedBatch | TreeBatch | SplitBatch) -> SharedRow:
    """Return what attention needs to know about a batch in one row."""
    if isinstance(batch, SharedBatch):
        return SharedPrompt(batch)
    return SharedTree(batch) if isinstance(batch, TreeBatch) else batch


def completion_loss(
    model: nn.Module,
    batch: Batch,
    loss_of: LossOf,
    routed: Routed | None = None,
    *,
    collisions: bool = False,
) -> Tensor:
    """Compute a loss of `batch`'s log-probs, and its gradients in the same pass over the logits.

    Args:
        model: As in `completion_logps`.
        batch: As in `completion_logps`.
        loss_of: Maps the log-probs of a part of the batch (complete groups), float32 `[s]`, to the
            part's share of the loss, a scalar. It is called once per part, with autograd enabled.
        routed: Called once per call of the body, with differentiable logits of its routers; only
            for mixtures of experts.
        collisions: Give `loss_of` parts with `collisions`.

    Returns:
        The sum over the parts, a scalar; differentiable.

    Raises:
        SharedPromptError: As in `completion_logps`.
    """
    return inside(model, _loss, batch, loss_of, routed, collisions)


def _loss(
    model: nn.Module, batch: Batch, loss_of: LossOf, routed: Routed | None, collisions: bool
) -> Tensor:
    inner, targets = transformer(model), batch.targets
    if own := _own_share(inner, batch):
        assert not routed and not collisions  # refused with the settings
        return split_loss(own, *_split_states(inner, own), loss_of)
    hidden = target_states(inner, batch, routed)
    head = Head.of(inner)
    if head is None:
        whole = targets.whole
        if collisions:
            whole = replace(whole, collisions=_module_collisions(inner, hidden))
        return loss_of(_module_logps(inner, hidden, targets.target_ids), whole)
    parts = targets.parts(tile_rows(head))
    return head_loss(head, hidden, targets.target_ids, parts, loss_of, collisions=collisions)


def _module_logps(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """Apply a head that is more than a matrix, in tiles recomputed in the backward pass."""
    rows = max(1, TILE_ELEMENTS // model.config.get_text_config().vocab_size)
    tiles = zip(hidden.split(rows), target_ids.split(rows), strict=True)
    return torch.cat(
        [checkpoint(_module_tile_logps, model, h, t, use_reentrant=False) for h, t in tiles]
    )


@torch.no_grad()
def _module_collisions(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Return the log of the sum of squared probabilities for `hidden`, `[S, H]`: float32 `[S]`."""
    rows = max(1, TILE_ELEMENTS // model.config.get_text_config().vocab_size)
    found = [head_logits(model, part).float().log_softmax(1) for part in hidden.split(rows)]
    return torch.cat([torch.logsumexp(2 * logps, 1) for logps in found])


def _module_tile_logps(model: PreTrainedModel, hidden: Tensor, target_ids: Tensor) -> Tensor:
    return -cross_entropy(head_logits(model, hidden).float(), target_ids, reduction="none")
