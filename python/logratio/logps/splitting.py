"""Which sequences may go through a model in one call, and a batch cut into such calls.

A completion's log-probs are to be those that it has alone. Most models give them in any company;
these look at more than the sequence itself, beyond a number of tokens:

- **LongRoPE** (Phi-3) takes one set of factors where the longest sequence of the call is within the
  original context, and another one where it is not.
- **Dynamic NTK** computes its factors from the longest sequence of the call, and keeps them until a
  longer one comes.
- **Top-k attention** (DeepSeek-V3.2, Doge) chooses keys among all of the row, padding included.

So a batch of such a model is cut: sequences within the limit together, longer ones together
(LongRoPE) or with those of the same length only, without padding. A prompt whose completions are in
different calls runs once in each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from logratio._rust import StoreWriter
from logratio.data.feed import lay_out
from logratio.logps.batch import Batch, PaddedBatch, SharedBatch, TreeBatch, shape_for, to_torch

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
