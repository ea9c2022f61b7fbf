"""Layouts from Rust as torch tensors: no copy on the CPU, one copy to another device."""

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
    """Where the queries and the keys of `N` sequences begin in tensors that hold them end to end.

    Attributes:
        queries: int32 `[N + 1]`, and where the last one ends.
        keys: int32 `[N + 1]`, likewise.
        max_queries: most queries of a sequence, on the host.
        max_keys: most keys of a sequence, on the host.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


class SharedKeys(NamedTuple):
    """The tokens that several sequences have among their keys: those of the `P` prompt tokens.

    Attributes:
        tokens: int64 `[P]`, where each prompt token lies in the row.
        places: int64 `[P, M]`, where it lies among the gathered keys: for its prompt's sequence and
            for each completion of it; `M` is one more than the most completions of a group.
        counted: bool `[P, M]`, False on places that a smaller group does not have, and which repeat
            the first one; None where every group has as many completions.
    """

    tokens: Tensor
    places: Tensor
    counted: Tensor | None


@dataclass(frozen=True)
class Sequences:
    """`Q` sequences over a row of `T` tokens, with `K` keys in all, for a batch of `G` groups.

    What fills the row up to a fixed width is the last sequence, and no group's.

    Attributes:
        cu_seqlens_q: int32 `[Q + 1]`, where each sequence's queries begin in the row, and `T`.
        cu_seqlens_k: int32 `[Q + 1]`, where its keys begin in `key_index`, and `K`.
        key_index: int64 `[K]`, the token of the row that each key is.
        prompt_lengths: int64 `[G]`, tokens of each prompt.
        group_sizes: int64 `[G]`, completions of each group.
        tokens: `T`, on the host, as all numbers below.
        max_queries: most queries of a sequence.
        max_keys: most keys of a sequence.
        max_prompt: most tokens of a prompt.
        max_answers: most tokens of all completions of a group together.
        prompt_tokens: the sum of `prompt_lengths`.
        most_completions: the largest of `group_sizes`.
        fewest_completions: the smallest.
        masks: for `attention.flex`, which makes one for each window and keeps it for the layers.
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
        """Each sequence, and its keys in `key_index`: its prompt's and its own."""
        return Bounds(self.cu_seqlens_q, self.cu_seqlens_k, self.max_queries, self.max_keys)

    @property
    def on_themselves(self) -> Bounds:
        """Each sequence, and its own tokens as keys: those of the row."""
        return Bounds(self.cu_seqlens_q, self.cu_seqlens_q, self.max_queries, self.max_queries)

    @cached_property
    def on_prompts(self) -> Bounds:
        """All completions of a group as one sequence, whose keys are those of `prompt_rows`.

        The tokens between, of prompts and of what fills the row up, are sequences without keys.
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
        """The place of each prompt token in the row, int64 `[P]`."""
        group, offset = self._prompt_tokens
        return self.cu_seqlens_q[self._first[group]] + offset

    @cached_property
    def of_token(self) -> Tensor:
        """The sequence of each token, int64 `[T]`; nothing here waits for the device."""
        ends = self.cu_seqlens_q[1:]
        return torch.searchsorted(ends, self._tokens.to(ends.dtype), right=True)

    @cached_property
    def own_place(self) -> Tensor:
        """Where each token lies among the keys of its own sequence, int64 `[T]`, below `K`."""
        after = self.of_token + 1  # a sequence's own tokens are the last of its keys
        return self.cu_seqlens_k[after].long() - self.cu_seqlens_q[after] + self._tokens

    @cached_property
    def positions(self) -> Tensor:
        """How many keys of its own sequence lie before each token, int64 `[T]`."""
        return self.own_place - self.cu_seqlens_k[self.of_token]

    @cached_property
    def prompt_of_token(self) -> Tensor:
        """The sequence of the prompt of each token, int64 `[T]`; a prompt's token: its own."""
        sequences = torch.arange(len(self.cu_seqlens_q) - 1, device=self.key_index.device)
        prompts = torch.searchsorted(self._first, sequences, right=True) - 1
        found = self._first[prompts]
        of_groups = sequences < (self.group_sizes + 1).sum()
        return torch.where(of_groups, found, sequences)[self.of_token]

    @cached_property
    def shared_keys(self) -> SharedKeys:
        """The prompts' tokens, and each one's places among the keys."""
        group, offset = self._prompt_tokens
        number = torch.arange(self.most_completions + 1, device=group.device)
        counted = number <= self.group_sizes[group, None]
        sequence = self._first[group, None] + number * counted
        places = self.cu_seqlens_k[sequence] + offset[:, None]
        same = self.most_completions == self.fewest_completions
        return SharedKeys(self.prompt_rows, places, None if same else counted)

    @cached_property
    def _prompt_tokens(self) -> tuple[Tensor, Tensor]:
        """The group of each token of a prompt, and its place in the prompt: int64 `[P]` each."""
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
        logit_index: int64 `[S]`, position (in the flattened batch) that predicts each target.
        target_ids: int64 `[S]`.
        completion_mask: bool `[S]`, False on tokens that do not count.
        completion_of: int64 `[S]`, number of the completion each target belongs to.
        lengths: float64 `[N]`, how many tokens of each completion count.
        counted: bool numpy `[S]`, `completion_mask` on the host.
        rows: int64 numpy `[N]`, row of each completion in the store; on the host.
        groups: int64 numpy `[G]`, group numbers in the store.
        completion_offsets: int64 numpy `[N + 1]`, where the targets of each completion begin.
        group_offsets: int64 numpy `[G + 1]`, where the completions of each group begin.
    """

    logit_index: Tensor
    target_ids: Tensor
    completion_mask: Tensor
    completion_of: Tensor
    lengths: Tensor
    counted: np.ndarray
    rows: np.ndarray
    groups: np.ndarray
    completion_offsets: np.ndarray
    group_offsets: np.ndarray

    def sums(self, per_token_logps: Tensor) -> Tensor:
        """Add up the tokens that count: `[S]` to float64 `[N]`; differentiable.

        In float32 each addition rounds to a unit of the whole sum: at 32,000 tokens 0.4 nats went.
        """
        counted = torch.where(self.completion_mask, per_token_logps, 0.0).double()
        return counted.new_zeros(len(self.rows)).index_add(0, self.completion_of, counted)

    def host_sums(self, per_token_logps: np.ndarray) -> np.ndarray:
        """Add up as `sums` does, in its order, what is on the host: `[S]` to float64 `[N]`."""
        completions = len(self.rows)
        owners = np.repeat(np.arange(completions), np.diff(self.completion_offsets))
        return np.bincount(owners, np.where(self.counted, per_token_logps, 0.0), completions)

    @property
    def whole(self) -> "Part":
        """All of it."""
        return self.part(0, len(self.groups))

    def parts(self, limit: int) -> "list[Part]":
        """Cut the batch into runs of whole groups with at most `limit` targets, or one group."""
        ends, first, cuts = self.completion_offsets[self.group_offsets], 0, [0]
        while first < len(self.groups):
            fits = int(np.searchsorted(ends, ends[first] + limit, side="right")) - 1
            first = max(first + 1, fits)
            cuts.append(first)
        return [self.part(start, stop) for start, stop in pairwise(cuts)]

    def part(self, first: int, last: int) -> "Part":
        """Return groups `first` to `last` (exclusive), with their place in the batch."""
        groups = slice(first, last)
        completions = slice(*self.group_offsets[[first, last]].tolist())
        at = slice(*self.completion_offsets[[completions.start, completions.stop]].tolist())
        own = TargetTokens(
            logit_index=self.logit_index[at],
            target_ids=self.target_ids[at],
            completion_mask=self.completion_mask[at],
            completion_of=self.completion_of[at] - completions.start,
            lengths=self.lengths[completions],
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
        targets: their targets, numbered from 0 as if they were a batch.
        completions: which of the batch's completions they have.
        targets_at: which of the batch's targets.
    """

    targets: TargetTokens
    completions: slice
    targets_at: slice


@dataclass(frozen=True)
class SharedBatch:
    """Groups end to end in one row: each prompt once, then its completions.

    Attributes:
        input_ids: int64 `[1, T]`.
        position_ids: int64 `[1, T]`, restarting at the prompt's length for each completion.
        prompt_lengths: prompt tokens of each group, on the host.
        completion_lengths: for each group, the tokens of each of its completions, on the host.
        targets: the scored tokens.
        sequences: the row for variable-length kernels; None if they were not laid out, as on a CPU.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_lengths: list[int]
    completion_lengths: list[list[int]]
    targets: TargetTokens
    sequences: Sequences | None = None


@dataclass(frozen=True)
class TreeBatch:
    """Groups as a tree in one row: what their sequences begin with alike is there once.

    A run is what one sequence (a prompt with a completion) adds to those before it.

    Attributes:
        input_ids: int64 `[1, T]`.
        position_ids: int64 `[1, T]`, of each token in its sequences.
        targets: the scored tokens.
        starts: int32 numpy `[Q + 1]`, the first token of each run, and `T`; on the host.
        key_offsets: int32 numpy `[Q + 1]`, where each run begins in `key_index`, and `K`.
        key_index: int64 numpy `[K]`, the tokens that each run goes on from, then its own.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: TargetTokens
    starts: np.ndarray
    key_offsets: np.ndarray
    key_index: np.ndarray

    def path(self, token: int) -> np.ndarray:
        """Return the tokens of the row from a beginning to `token`, itself the last: int64."""
        run = int(np.searchsorted(self.starts, token, side="right")) - 1
        keys = self.key_index[self.key_offsets[run] : self.key_offsets[run + 1]]
        found: np.ndarray = keys[keys <= token]
        return found


@dataclass(frozen=True)
class PaddedBatch:
    """One right-padded row per completion: int64 `[N, T]` each, and the scored tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: TargetTokens


Batch = SharedBatch | TreeBatch | PaddedBatch

Layout = SharedLayout | TreeLayout | PaddedLayout


def to_torch(layout: Layout, device: torch.device | str = "cpu") -> Batch:
    """Wrap a layout's arrays as tensors on `device`.

    On the CPU they are the arrays. To another device all arrays go in one copy, which goes on while
    the host goes on if the layout's buffer is `pinned`.
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
    """Make a buffer, uint8 `[nbytes]`, that CUDA copies from without waiting.

    torch keeps such memory for reuse, and takes it back only when the copies out of it are done.
    """
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


def onto(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on `device`; CUDA copies it while the host goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def buffers_for(device: torch.device) -> Callable[[int], np.ndarray]:
    """Return what makes the buffers of batches that go to `device`."""
    return pinned if device.type == "cuda" else BufferPool()


SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "key_index", "max_seqlens")
"""The arrays that variable-length kernels need beside the usual ones."""

_USUAL = (
    *("input_ids", "position_ids", "logit_index", "target_ids", "completion_mask"),
    *("completion_of", "completion_offsets", "prompt_lengths", "completion_lengths"),
    *("group_sizes", "roles", "groups", "completions"),
)


def fields_for(layout: str, device: torch.device | str) -> tuple[str, ...] | None:
    """Name the arrays that `lay_out` should fill for a batch on `device`; None: its usual ones.

    Variable-length kernels run on CUDA alone, so only there a shared row brings its sequences.
    """
    if layout != "shared" or torch.device(device).type != "cuda":
        return None
    return _USUAL + SEQUENCES


ROW_STEP = 128
"""Tokens that the length of a shared row on CUDA is a multiple of: an allocator that sees few sizes
has its blocks used again, and this is the tile of attention kernels."""


class Shape(TypedDict):
    """The keywords of `lay_out`: `fields` and `multiple_of`."""

    fields: tuple[str, ...] | None
    multiple_of: int


def shape_for(layout: str, device: torch.device | str) -> Shape:
    """Return the shape of batches on `device`; a padded row is not filled up, as there are many."""
    step = 1 if (fields := fields_for(layout, device)) is None else ROW_STEP
    return Shape(fields=fields, multiple_of=step)


class _Tensors:
    """The arrays of a layout as tensors on a device, by name."""

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
    """Return the tokens of the completions of the group that has most of them."""
    before = np.concatenate([[0], np.cumsum(layout.completion_lengths)])
    return int(np.diff(before[np.cumsum(layout.group_sizes)], prepend=0).max())


def _by_group(layout: SharedLayout) -> list[list[int]]:
    ends = np.cumsum(layout.group_sizes)[:-1]
    return [part.tolist() for part in np.split(layout.completion_lengths, ends)]
