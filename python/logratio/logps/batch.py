"""Batches as torch tensors, from layouts built in Rust.

On the CPU the tensors share the layout's memory; for another device there is a single copy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from logratio._rust import PaddedLayout, SharedLayout, TreeLayout
from logratio.data.feed import BufferPool


class Bounds(NamedTuple):
    """Offsets of `N` sequences in concatenated queries and keys, for variable-length kernels.

    Attributes:
        queries: Start of each sequence's queries, and the end of the last, int32 `[N + 1]`.
        keys: The same for the keys, int32 `[N + 1]`.
        max_queries: Largest number of queries in a sequence, on the host.
        max_keys: Largest number of keys in a sequence, on the host.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


class SharedKeys(NamedTuple):
    """Positions of the `P` prompt tokens, which are keys of several sequences.

    Attributes:
        tokens: Position of each prompt token in the row, int64 `[P]`.
        places: Its positions among the gathered keys, int64 `[P, M]`: in the prompt's sequence and
            in each completion's. `M` is one more than the largest number of completions in a
            group.
        counted: Validity of `places`, bool `[P, M]`. Smaller groups repeat their first position,
            with False here. None if all groups have equally many completions.
    """

    tokens: Tensor
    places: Tensor
    counted: Tensor | None


@dataclass(frozen=True)
class Sequences:
    """`Q` sequences over a row of `T` tokens, with `K` keys in total, for a batch of `G` groups.

    A sequence is a prompt, or a completion whose keys include its prompt. Padding at the end of the
    row is the last sequence and belongs to no group.

    Attributes:
        cu_seqlens_q: Start of each sequence's queries in the row, and `T`, int32 `[Q + 1]`.
        cu_seqlens_k: Start of its keys in `key_index`, and `K`, int32 `[Q + 1]`.
        key_index: Position in the row of each key, int64 `[K]`.
        prompt_lengths: Tokens of each prompt, int64 `[G]`.
        group_sizes: Completions of each group, int64 `[G]`.
        tokens: `T`. This and all integers below are on the host.
        max_queries: Largest number of queries in a sequence.
        max_keys: Largest number of keys in a sequence.
        max_prompt: Largest number of tokens in a prompt.
        max_answers: Largest number of tokens in all completions of a group together.
        prompt_tokens: Sum of `prompt_lengths`.
        most_completions: Maximum of `group_sizes`.
        fewest_completions: Minimum of `group_sizes`.
        masks: Block masks of `attention.flex` by window, cached for all layers.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor
    prompt_lengths: Tensor
    group_sizes: Tensor
    tokens: int
    max_queries: int
    max_keys: int
    max_prompt: int
    max_answers: int
    prompt_tokens: int
    most_completions: int
    fewest_completions: int
    masks: dict[int | None, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def with_prompts(self) -> Bounds:
        """Each sequence with all its keys in `key_index`: those of its prompt, then its tokens."""
        return Bounds(self.cu_seqlens_q, self.cu_seqlens_k, self.max_queries, self.max_keys)

    @property
    def on_themselves(self) -> Bounds:
        """Each sequence with only its tokens as keys, which are those of the row."""
        return Bounds(self.cu_seqlens_q, self.cu_seqlens_q, self.max_queries, self.max_queries)

    @cached_property
    def on_prompts(self) -> Bounds:
        """All completions of a group as one sequence, with its prompt in `prompt_rows` as keys.

        Prompts and padding are sequences without keys.
        """
        ends = (self.group_sizes + 1).cumsum(0)
        inside = torch.stack(
            [self.cu_seqlens_q[self._first], self.cu_seqlens_q[self._first + 1]], 1
        )
        outside = (self.cu_seqlens_q[ends[-1:]], self.cu_seqlens_q[-1:])
        after = self.prompt_lengths.cumsum(0)
        keys = torch.stack([after - self.prompt_lengths, after], 1).flatten()
        return Bounds(
            torch.cat([inside.flatten(), *outside]),
            torch.cat([keys[:1], keys, keys[-1:]]).to(self.cu_seqlens_q.dtype),
            max(self.max_queries, self.max_answers),
            self.max_prompt,
        )

    @cached_property
    def prompt_rows(self) -> Tensor:
        """Position of each prompt token in the row, int64 `[P]`."""
        group, offset = self._prompt_tokens
        return self.cu_seqlens_q[self._first[group]] + offset

    @cached_property
    def of_token(self) -> Tensor:
        """Sequence number of each token, int64 `[T]`, computed without a device synchronization."""
        ends = self.cu_seqlens_q[1:]
        return torch.searchsorted(ends, self._tokens.to(ends.dtype), right=True)

    @cached_property
    def own_place(self) -> Tensor:
        """Index of each token among the keys of its sequence, int64 `[T]`, less than `K`."""
        after = self.of_token + 1  # the tokens of a sequence are the last of its keys
        return self.cu_seqlens_k[after].long() - self.cu_seqlens_q[after] + self._tokens

    @cached_property
    def positions(self) -> Tensor:
        """Number of keys before each token in its sequence, int64 `[T]`."""
        return self.own_place - self.cu_seqlens_k[self.of_token]

    @cached_property
    def prompt_of_token(self) -> Tensor:
        """Sequence number of each token's prompt, int64 `[T]`; of a prompt token, its sequence."""
        sequences = torch.arange(len(self.cu_seqlens_q) - 1, device=self.key_index.device)
        prompts = torch.searchsorted(self._first, sequences, right=True) - 1
        found = self._first[prompts]
        of_groups = sequences < (self.group_sizes + 1).sum()
        return torch.where(of_groups, found, sequences)[self.of_token]

    @cached_property
    def shared_keys(self) -> SharedKeys:
        """The prompt tokens and their positions among the keys."""
        group, offset = self._prompt_tokens
        number = torch.arange(self.most_completions + 1, device=group.device)
        counted = number <= self.group_sizes[group, None]
        sequence = self._first[group, None] + number * counted
        places = self.cu_seqlens_k[sequence] + offset[:, None]
        same = self.most_completions == self.fewest_completions
        return SharedKeys(self.prompt_rows, places, None if same else counted)

    @cached_property
    def _prompt_tokens(self) -> tuple[Tensor, Tensor]:
        """Group and position within the prompt of each prompt token, int64 `[P]` each."""
        groups = torch.arange(len(self.group_sizes), device=self.key_index.device)
        group = groups.repeat_interleave(self.prompt_lengths, output_size=self.prompt_tokens)
        before = self.prompt_lengths.cumsum(0) - self.prompt_lengths
        return group, torch.arange(self.prompt_tokens, device=group.device) - before[group]

    @cached_property
    def _first(self) -> Tensor:
        sizes = self.group_sizes + 1
        return sizes.cumsum(0) - sizes

    @property
    def _tokens(self) -> Tensor:
        return torch.arange(self.tokens, device=self.key_index.device)


@dataclass(frozen=True)
class TargetTokens:
    """The scored tokens of a batch, flat and group-major: `S` targets of `N` completions.

    Attributes:
        logit_index: Position in the flattened batch that predicts each target, int64 `[S]`.
        target_ids: Token id of each target, int64 `[S]`.
        completion_mask: False for targets that do not count, bool `[S]`.
        completion_of: Index of each target's completion, int64 `[S]`.
        lengths: Number of counted targets of each completion, float64 `[N]`.
        roles: Role of each completion, an index into `logratio._rust.ROLES`, uint8 `[N]`.
        counted: `completion_mask` on the host, bool numpy `[S]`.
        rows: Row of each completion in the store, int64 numpy `[N]`.
        groups: Group numbers in the store, int64 numpy `[G]`.
        completion_offsets: Start of each completion's targets, and `S`, int64 numpy `[N + 1]`.
        group_offsets: Start of each group's completions, and `N`, int64 numpy `[G + 1]`.
    """

    logit_index: Tensor
    target_ids: Tensor
    completion_mask: Tensor
    completion_of: Tensor
    lengths: Tensor
    roles: Tensor
    counted: np.ndarray
    rows: np.ndarray
    groups: np.ndarray
    completion_offsets: np.ndarray
    group_offsets: np.ndarray

    def sums(self, per_token_logps: Tensor) -> Tensor:
        """Sum the counted tokens of each completion, `[S]` to float64 `[N]`; differentiable.

        Sums are float64 because float32 sums lost 0.4 nats to rounding over 32,000 tokens.
        """
        counted = torch.where(self.completion_mask, per_token_logps, 0.0).double()
        return counted.new_zeros(len(self.rows)).index_add(0, self.completion_of, counted)

    def host_sums(self, per_token_logps: np.ndarray) -> np.ndarray:
        """Sum like `sums`, in the same order, on the host: `[S]` to float64 `[N]`."""
        completions = len(self.rows)
        owners = np.repeat(np.arange(completions), np.diff(self.completion_offsets))
        return np.bincount(owners, np.where(self.counted, per_token_logps, 0.0), completions)

    @property
    def whole(self) -> "Part":
        """The whole batch as one part."""
        return self.part(0, len(self.groups))

    def parts(self, limit: int) -> "list[Part]":
        """Split the batch into parts of complete groups, each of at most `limit` targets.

        A group with more targets forms a part alone.
        """
        ends, first, cuts = self.completion_offsets[self.group_offsets], 0, [0]
        while first < len(self.groups):
            fits = int(np.searchsorted(ends, ends[first] + limit, side="right")) - 1
            first = max(first + 1, fits)
            cuts.append(first)
        return [self.part(start, stop) for start, stop in pairwise(cuts)]

    def part(self, first: int, last: int) -> "Part":
        """Return groups `first` to `last` (exclusive), with their positions in the batch."""
        groups = slice(first, last)
        completions = slice(*self.group_offsets[[first, last]].tolist())
        at = slice(*self.completion_offsets[[completions.start, completions.stop]].tolist())
        own = TargetTokens(
            logit_index=self.logit_index[at],
            target_ids=self.target_ids[at],
            completion_mask=self.completion_mask[at],
            completion_of=self.completion_of[at] - completions.start,
            lengths=self.lengths[completions],
            roles=self.roles[completions],
            counted=self.counted[at],
            rows=self.rows[completions],
            groups=self.groups[groups],
            completion_offsets=self.completion_offsets[completions.start : completions.stop + 1]
            - at.start,
            group_offsets=self.group_offsets[first : last + 1] - completions.start,
        )
        return Part(own, completions, at)


@dataclass(frozen=True)
class Part:
    """Some consecutive groups of a batch.

    Attributes:
        targets: Targets of these groups, with indices relative to the part.
        completions: Slice of the batch's completions.
        targets_at: Slice of the batch's targets.
        collisions: Log of the sum of all squared probabilities at each target, float32 `[s]`,
            without a gradient; None unless a loss asks for it.
        divergences: KL divergence between the whole distributions of another model and of this one
            at each target, float32 `[s]`, differentiable; None unless a loss asks for it.
    """

    targets: TargetTokens
    completions: slice
    targets_at: slice
    collisions: Tensor | None = None
    divergences: Tensor | None = None


@dataclass(frozen=True)
class SharedBatch:
    """Groups concatenated in one row: each prompt once, followed by its completions.

    Attributes:
        input_ids: Token ids, int64 `[1, T]`.
        position_ids: Positions, which restart at the prompt's length for each completion, int64
            `[1, T]`.
        prompt_lengths: Prompt tokens of each group, on the host.
        completion_lengths: Tokens of each completion of each group, on the host.
        targets: The scored tokens.
        sequences: The row's sequences for variable-length kernels; None on a CPU.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_lengths: list[int]
    completion_lengths: list[list[int]]
    targets: TargetTokens
    sequences: Sequences | None = None


@dataclass(frozen=True)
class TreeBatch:
    """Groups as a prefix tree in one row: tokens that sequences share at the start occur once.

    A run is the part of one sequence (prompt and completion) that is not shared with the sequences
    before it.

    Attributes:
        input_ids: Token ids, int64 `[1, T]`.
        position_ids: Position of each token in its sequences, int64 `[1, T]`.
        targets: The scored tokens.
        starts: First token of each run, and `T`, int32 numpy `[Q + 1]`.
        key_offsets: Start of each run's keys in `key_index`, and `K`, int32 numpy `[Q + 1]`.
        key_index: Tokens that precede each run in its sequence, then its tokens, int64 numpy `[K]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: TargetTokens
    starts: np.ndarray
    key_offsets: np.ndarray
    key_index: np.ndarray

    def path(self, token: int) -> np.ndarray:
        """Return the positions of all tokens of a sequence up to and including `token`, int64."""
        run = int(np.searchsorted(self.starts, token, side="right")) - 1
        keys = self.key_index[self.key_offsets[run] : self.key_offsets[run + 1]]
        found: np.ndarray = keys[keys <= token]
        return found


@dataclass(frozen=True)
class PaddedBatch:
    """One right-padded row per completion.

    Attributes:
        input_ids: Token ids, int64 `[N, T]`.
        attention_mask: 1 for tokens and 0 for padding, int64 `[N, T]`.
        position_ids: Positions, int64 `[N, T]`.
        targets: The scored tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: TargetTokens


Batch = SharedBatch | TreeBatch | PaddedBatch

Layout = SharedLayout | TreeLayout | PaddedLayout


def to_torch(layout: Layout, device: torch.device | str = "cpu") -> Batch:
    """Convert a layout to a batch of tensors on `device`.

    On the CPU, tensors share the layout's memory. For another device, all arrays are copied at
    once, asynchronously if the layout's buffer is `pinned`.
    """
    tensors = _Tensors(layout, torch.device(device))
    if isinstance(layout, SharedLayout):
        return SharedBatch(
            input_ids=tensors["input_ids"][None],
            position_ids=tensors["position_ids"][None],
            prompt_lengths=layout.prompt_lengths.tolist(),
            completion_lengths=_by_group(layout),
            targets=_targets(layout, tensors),
            sequences=_sequences(layout, tensors),
        )
    if isinstance(layout, TreeLayout):
        return TreeBatch(
            input_ids=tensors["input_ids"][None],
            position_ids=tensors["position_ids"][None],
            targets=_targets(layout, tensors),
            starts=layout.cu_seqlens_q,
            key_offsets=layout.cu_seqlens_k,
            key_index=layout.key_index,
        )
    return PaddedBatch(
        input_ids=tensors["input_ids"],
        attention_mask=tensors["attention_mask"],
        position_ids=tensors["position_ids"],
        targets=_targets(layout, tensors),
    )


def pinned(nbytes: int) -> np.ndarray:
    """Allocate a pinned buffer, uint8 `[nbytes]`, for asynchronous copies to CUDA.

    torch caches pinned memory, and reuses it only after the copies from it have completed.
    """
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def onto(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to `device` as a tensor, asynchronously on CUDA."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def buffers_for(device: torch.device) -> Callable[[int], np.ndarray]:
    """Return the allocator of buffers for batches on `device`."""
    return pinned if device.type == "cuda" else BufferPool()


SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "key_index", "max_seqlens")
"""Additional arrays of a layout for variable-length kernels."""

_USUAL = (
    *("input_ids", "position_ids", "logit_index", "target_ids", "completion_mask"),
    *("completion_of", "completion_offsets", "prompt_lengths", "completion_lengths"),
    *("group_sizes", "roles", "groups", "completions"),
)


def fields_for(layout: str, device: torch.device | str) -> tuple[str, ...] | None:
    """Return the names of arrays that `lay_out` fills for a batch on `device`; None: the default.

    Variable-length kernels run only on CUDA, so sequences are laid out only there.
    """
    if layout != "shared" or torch.device(device).type != "cuda":
        return None
    return _USUAL + SEQUENCES


ROW_STEP = 128
"""Shared rows on CUDA are padded to a multiple of this many tokens. Fewer sizes let the allocator
reuse its blocks, and 128 is the tile size of attention kernels."""


class Shape(TypedDict):
    """Keyword arguments of `lay_out`: `fields` and `multiple_of`."""

    fields: tuple[str, ...] | None
    multiple_of: int


def shape_for(layout: str, device: torch.device | str) -> Shape:
    """Return the `Shape` of batches on `device`; only shared rows on CUDA are padded."""
    step = 1 if (fields := fields_for(layout, device)) is None else ROW_STEP
    return Shape(fields=fields, multiple_of=step)


class _Tensors:
    """Arrays of a layout as tensors on a device, by name."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._bytes: Tensor | None = None
        if device.type != "cpu":
            arena = torch.from_numpy(layout.arena[: layout.nbytes])
            self._bytes, self._table = arena.to(device, non_blocking=True), layout.table

    def __getitem__(self, name: str) -> Tensor:
        if self._bytes is None:
            return torch.from_numpy(getattr(self._layout, name))
        kind, start, shape = self._table[name]
        dtype: torch.dtype = getattr(torch, kind)
        stop = start + math.prod(shape) * dtype.itemsize
        return self._bytes[start:stop].view(dtype).view(shape)


def _targets(layout: Layout, tensors: _Tensors) -> TargetTokens:
    mask, owners = tensors["completion_mask"], tensors["completion_of"]
    zeros = torch.zeros(len(layout.completions), dtype=torch.float64, device=mask.device)
    return TargetTokens(
        logit_index=tensors["logit_index"],
        target_ids=tensors["target_ids"],
        completion_mask=mask,
        completion_of=owners,
        lengths=zeros.index_add(0, owners, mask.double()),
        roles=tensors["roles"],
        counted=layout.completion_mask,
        rows=layout.completions,
        groups=layout.groups,
        completion_offsets=layout.completion_offsets,
        group_offsets=np.concatenate([[0], np.cumsum(layout.group_sizes)]),
    )


def _sequences(layout: SharedLayout, tensors: _Tensors) -> Sequences | None:
    if not set(SEQUENCES) <= set(layout.table):
        return None
    most_queries, most_keys = layout.max_seqlens.tolist()
    return Sequences(
        cu_seqlens_q=tensors["cu_seqlens_q"],
        cu_seqlens_k=tensors["cu_seqlens_k"],
        key_index=tensors["key_index"],
        prompt_lengths=tensors["prompt_lengths"],
        group_sizes=tensors["group_sizes"],
        tokens=layout.input_ids.size,
        max_queries=most_queries,
        max_keys=most_keys,
        max_prompt=int(layout.prompt_lengths.max()),
        max_answers=_most_answers(layout),
        prompt_tokens=int(layout.prompt_lengths.sum()),
        most_completions=int(layout.group_sizes.max()),
        fewest_completions=int(layout.group_sizes.min()),
    )


def _most_answers(layout: SharedLayout) -> int:
    """Return the largest number of completion tokens in a group."""
    before = np.concatenate([[0], np.cumsum(layout.completion_lengths)])
    return int(np.diff(before[np.cumsum(layout.group_sizes)], prepend=0).max())


def _by_group(layout: SharedLayout) -> list[list[int]]:
    ends = np.cumsum(layout.group_sizes)[:-1]
    return [part.tolist() for part in np.split(layout.completion_lengths, ends)]
