"""Batches as torch tensors, from layouts built in Rust.

On the CPU the tensors share the layout's memory; for another device there is a single copy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from logratio._rust import PaddedLayout, SharedLayout, TreeLayout
from logratio.data.feed import BufferPool
from logratio.logps.sequences import Branches, Runs, Sequences


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
        runs: The runs, on the host.
        ids_on_host: The token ids, int64 numpy `[T]`.
        targets_on_host: `logit_index` and `target_ids` of the targets, int64 numpy `[S]` each.
        branches: The runs for variable-length kernels; None on a CPU.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: TargetTokens
    runs: Runs
    ids_on_host: np.ndarray
    targets_on_host: tuple[np.ndarray, np.ndarray]
    branches: Branches | None = None

    @cached_property
    def last_tokens(self) -> np.ndarray:
        """The position of each completion's last token, int64 numpy `[N]`.

        It is the one token with its id that follows the token by which it is predicted.
        """
        last, ids = self.targets.completion_offsets[1:] - 1, self.ids_on_host
        before, wanted = (column[last] for column in self.targets_on_host)
        span = int(ids.max()) + 1
        keys = (self.runs.before + 1) * span + ids
        order = keys.argsort()
        found: np.ndarray = order[np.searchsorted(keys[order], (before + 1) * span + wanted)]
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
        return _tree(layout, tensors)
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

    @property
    def are_on_host(self) -> bool:
        """Whether the tensors share the layout's memory."""
        return self._bytes is None

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


def _tree(layout: TreeLayout, tensors: _Tensors) -> TreeBatch:
    names = ("cu_seqlens_q", "cu_seqlens_k", "key_index")
    runs, branches = Runs(*(getattr(layout, name) for name in names)), None
    if not tensors.are_on_host:
        branches = Branches.of(runs, *(tensors[name] for name in names))
    return TreeBatch(
        input_ids=tensors["input_ids"][None],
        position_ids=tensors["position_ids"][None],
        targets=_targets(layout, tensors),
        runs=runs,
        ids_on_host=layout.input_ids,
        targets_on_host=(layout.logit_index, layout.target_ids),
        branches=branches,
    )


def _most_answers(layout: SharedLayout) -> int:
    """Return the largest number of completion tokens in a group."""
    before = np.concatenate([[0], np.cumsum(layout.completion_lengths)])
    return int(np.diff(before[np.cumsum(layout.group_sizes)], prepend=0).max())


def _by_group(layout: SharedLayout) -> list[list[int]]:
    ends = np.cumsum(layout.group_sizes)[:-1]
    return [part.tolist() for part in np.split(layout.completion_lengths, ends)]
