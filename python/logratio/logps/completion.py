"""The only place where log-probs are made, and which sequences may go through a model at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from logratio._rust import StoreWriter
from logratio.data.feed import lay_out
from logratio.logps.attention.interface import NAME, SharedPromptError, shared_prompts
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.tree import SharedTree
from logratio.logps.batch import Batch, PaddedBatch, SharedBatch, TreeBatch, shape_for, to_torch
from logratio.logps.head import TILE_ELEMENTS, Head, head_logits, tile_rows
from logratio.logps.head_loss import LossOf, head_logps, head_loss

Group = tuple[list[int], list[list[int]]]
"""Token ids of a prompt, and of each of its completions."""

_LAYOUTS = {SharedBatch: "shared", TreeBatch: "tree", PaddedBatch: "padded"}

TOP_K = ("index_topk", "keep_window_size")
"""How configs name the number of keys that attention chooses: DeepSeek and GLM; Doge."""


@dataclass(frozen=True)
class Limit:
    """A number of tokens from which on a sequence's company matters.

    Attributes:
        tokens: sequences of at most so many are computed alike in any company of such.
        by_length: longer ones only beside others of their length; else beside any longer ones.
        what: the model's part that looks at its company, for messages.
        is_padding_seen: whether padding is company, and prompts cannot be shared.
        is_kept: whether what the model takes from one call's company is kept for the next call.
    """

    tokens: int
    by_length: bool
    what: str
    is_padding_seen: bool = False
    is_kept: bool = False

    def kinds(self, lengths: np.ndarray) -> np.ndarray:
        """Number sequences of `lengths` tokens, int64 `[N]`: equal numbers may share a call."""
        return np.where(lengths <= self.tokens, 0, lengths if self.by_length else 1)


def limits_of(config: PreTrainedConfig) -> tuple[Limit, ...]:
    """Read a model's limits in its config; most have none."""
    text = config.get_text_config()
    found = [_rope_limit(text, rope) for rope in ropes(text)]
    chosen = (getattr(text, name, None) for name in TOP_K)
    found += [Limit(k, True, "top-k attention", is_padding_seen=True) for k in chosen if k]
    return tuple(dict.fromkeys(limit for limit in found if limit))


def ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Yield the settings of each rotary embedding; families with several keep them by layer."""
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


def with_fresh_rope(model: nn.Module) -> None:
    """Let dynamic NTK factors begin anew: they are kept from the longest sequence so far."""
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
    """A part of a batch that may go through a model at once.

    Attributes:
        batch: the part.
        targets_at: int64 numpy `[s]`, which of the whole batch's targets it has.
    """

    batch: Batch
    targets_at: np.ndarray


def apart(batch: Batch, limits: tuple[Limit, ...]) -> list[Call]:
    """Cut a batch into calls that no limit forbids; one call, and no copy, where none does."""
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
    """Tell whether a row is wider than a limit allows for the sequences that are in it."""
    if not isinstance(batch, PaddedBatch):
        return False
    width = batch.input_ids.shape[1]
    return width > lengths.max() and any(width > limit.tokens for limit in limits)


def _part(batch: Batch, groups: list[Group], wanted: np.ndarray) -> Call:
    """Lay out the wanted completions, bool `[N]`, in the batch's own layout."""
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
    """Read the token ids of a batch's groups, on the host."""
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
    targets, row = batch.targets, batch.input_ids[0].cpu().numpy()
    leads = targets.completion_offsets[targets.group_offsets[:-1]]  # each group's first target
    ends = targets.logit_index.cpu().numpy()[leads]
    return [row[batch.path(end)].tolist() for end in ends.tolist()]


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
        start = int(batch.attention_mask[row].argmax())  # where padding on the left ends
        prompts.append(batch.input_ids[row, start : stop + 1].tolist())
    return prompts


def batch_of(groups: list[Group], layout: str, device: torch.device | str = "cpu") -> Batch:
    """Lay out groups of token ids that are in no file: for checks and small scoring jobs."""
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


def in_order(states: list[Tensor], calls: list[Call]) -> Tensor:
    """Put the states of each call's targets, `[s, H]`, in the whole batch's order: `[S, H]`."""
    if len(calls) == 1:
        return states[0]
    places = np.argsort(np.concatenate([call.targets_at for call in calls]))
    return torch.cat(states).index_select(0, torch.from_numpy(places).to(states[0].device))


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
