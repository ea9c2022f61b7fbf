"""Runs of tokens in a row, and the keys that each of them sees, for variable-length kernels.

`Sequences` are prompts with their completions; `Branches` are the runs of a tree.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


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
    """Positions of `P` tokens that are keys of several sequences.

    Attributes:
        tokens: Position of each token in the row, int64 `[P]`.
        places: Its positions among the gathered keys, int64 `[P, M]`: in its own sequence and in
            those that continue it.
        counted: Validity of `places`, bool `[P, M]`. Tokens that are keys of fewer sequences repeat
            their first position, with False here. None if all are keys of `M` sequences.
    """

    tokens: Tensor
    places: Tensor
    counted: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Row(ABC):
    """`Q` sequences over a row of `T` tokens, with `K` keys in total.

    The keys of a sequence are tokens before it, then its own tokens.

    Attributes:
        cu_seqlens_q: Start of each sequence's queries in the row, and `T`, int32 `[Q + 1]`.
        cu_seqlens_k: Start of its keys in `key_index`, and `K`, int32 `[Q + 1]`.
        key_index: Position in the row of each key, int64 `[K]`.
        tokens: `T`. This and the integers below are on the host.
        max_queries: Largest number of queries in a sequence.
        max_keys: Largest number of keys in a sequence.
        masks: Block masks of `attention.flex` by window, cached for all layers.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor
    tokens: int
    max_queries: int
    max_keys: int
    masks: dict[int | None, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def with_keys(self) -> Bounds:
        """Each sequence with all its keys in `key_index`."""
        return Bounds(self.cu_seqlens_q, self.cu_seqlens_k, self.max_queries, self.max_keys)

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

    @property
    @abstractmethod
    def ends(self) -> Tensor:
        """Position after the last token that may see each token, int64 `[T]`.

        The tokens that continue a token follow it without a gap, so token `q` sees `k` if and only
        if `k <= q < ends[k]`.
        """

    @property
    @abstractmethod
    def shared_keys(self) -> tuple[SharedKeys, ...]:
        """The tokens that are keys of several sequences, each in one of the parts."""

    @property
    def _tokens(self) -> Tensor:
        return torch.arange(self.tokens, device=self.key_index.device)


@dataclass(frozen=True, kw_only=True)
class Sequences(Row):
    """The sequences of a batch of `G` groups.

    A sequence is a prompt, or a completion whose keys include its prompt. Padding at the end of the
    row is the last sequence and belongs to no group.

    Attributes:
        prompt_lengths: Tokens of each prompt, int64 `[G]`.
        group_sizes: Completions of each group, int64 `[G]`.
        max_prompt: Largest number of tokens in a prompt. This and all below are on the host.
        max_answers: Largest number of tokens in all completions of a group together.
        prompt_tokens: Sum of `prompt_lengths`.
        most_completions: Maximum of `group_sizes`.
        fewest_completions: Minimum of `group_sizes`.
    """

    prompt_lengths: Tensor
    group_sizes: Tensor
    max_prompt: int
    max_answers: int
    prompt_tokens: int
    most_completions: int
    fewest_completions: int

    def prepare(self) -> None:
        """Compute what kernels need, before a layer is traced: the cache's locks are not traceable.

        All layers use the results, so their graphs take them as inputs.
        """
        _ = self.own_place, self.shared_keys, self.on_prompts, self.prompt_rows

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
    def ends(self) -> Tensor:
        """See `Row`: a prompt ends with its last completion."""
        own = self.cu_seqlens_q[1:].long()
        after = self.cu_seqlens_q[self._first + self.group_sizes + 1].long()
        return own.index_copy(0, self._first, after)[self.of_token]

    @cached_property
    def shared_keys(self) -> tuple[SharedKeys, ...]:
        """The prompt tokens and their positions among the keys, in one part."""
        group, offset = self._prompt_tokens
        number = torch.arange(self.most_completions + 1, device=group.device)
        counted = number <= self.group_sizes[group, None]
        sequence = self._first[group, None] + number * counted
        places = self.cu_seqlens_k[sequence] + offset[:, None]
        same = self.most_completions == self.fewest_completions
        return (SharedKeys(self.prompt_rows, places, None if same else counted),)

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


@dataclass(frozen=True)
class Runs:
    """The runs of a tree on the host: what each adds to the sequences before it.

    Attributes:
        starts: First token of each run, and `T`, int32 `[Q + 1]`.
        key_offsets: Start of each run's keys in `key_index`, and `K`, int32 `[Q + 1]`.
        key_index: Tokens that precede each run in its sequence, then its tokens, int64 `[K]`.
    """

    starts: np.ndarray
    key_offsets: np.ndarray
    key_index: np.ndarray

    @cached_property
    def paths(self) -> list[np.ndarray]:
        """The tokens that precede each run in its sequence, int64 each."""
        stops = self.key_offsets[1:] - np.diff(self.starts)
        spans = zip(self.key_offsets[:-1].tolist(), stops.tolist(), strict=True)
        return [self.key_index[start:stop] for start, stop in spans]

    @cached_property
    def ends(self) -> np.ndarray:
        """The position after all descendants of each token, int64 `[T]`."""
        ends = np.full(self.starts[-1], self.starts[-1], dtype=np.int64)
        for run, path in enumerate(self.paths[1:], 1):
            left = self.key_index[self.key_offsets[run - 1] : self.key_offsets[run]]
            ends[left[len(path) :]] = self.starts[run]  # this run does not continue these tokens
        return ends

    @cached_property
    def before(self) -> np.ndarray:
        """The position of the token before each token in its sequences, int64 `[T]`; else -1."""
        before = np.arange(-1, int(self.starts[-1]) - 1, dtype=np.int64)
        starts, ends = self.starts[:-1], self.key_offsets[1:] - np.diff(self.starts)
        is_first = ends == self.key_offsets[:-1]
        before[starts] = np.where(is_first, -1, self.key_index[np.maximum(ends - 1, 0)])
        return before

    def path_to(self, token: int) -> np.ndarray:
        """Return the positions of all tokens of a sequence up to and including `token`, int64."""
        run = int(np.searchsorted(self.starts, token, side="right")) - 1
        keys = self.key_index[self.key_offsets[run] : self.key_offsets[run + 1]]
        found: np.ndarray = keys[keys <= token]
        return found

    def copies(self) -> "list[tuple[np.ndarray, np.ndarray, np.ndarray]]":
        """Return `tokens`, `places` and `counted` of `SharedKeys`, in parts of similar counts.

        In a part the largest count is less than twice the smallest, rounded up to a power of two,
        so that a system prompt that all runs see does not widen the rows of all other tokens.
        """
        counts = np.bincount(self.key_index, minlength=int(self.starts[-1]))
        order = np.argsort(self.key_index, kind="stable")
        first, parts = np.cumsum(counts) - counts, []
        powers = np.ceil(np.log2(np.maximum(counts, 1))).astype(np.int64)
        for power in np.unique(powers[counts > 1]).tolist():
            tokens = np.flatnonzero((powers == power) & (counts > 1))
            number = np.arange(counts[tokens].max())
            counted = number < counts[tokens, None]
            parts.append((tokens, order[first[tokens, None] + number * counted], counted))
        return parts


@dataclass(frozen=True, kw_only=True)
class Branches(Row):
    """The runs of a tree: the keys of a run are the tokens on its path, then its own.

    Attributes:
        runs: The runs on the host.
    """

    runs: Runs

    @classmethod
    def of(cls, runs: Runs, starts: Tensor, key_offsets: Tensor, key_index: Tensor) -> "Branches":
        """Combine the runs with the same arrays on a device."""
        return cls(
            cu_seqlens_q=starts,
            cu_seqlens_k=key_offsets,
            key_index=key_index,
            tokens=int(runs.starts[-1]),
            max_queries=int(np.diff(runs.starts).max()),
            max_keys=int(np.diff(runs.key_offsets).max()),
            runs=runs,
        )

    @cached_property
    def ends(self) -> Tensor:
        """See `Row`: a token ends with its last descendant."""
        return onto(self.runs.ends, self.key_index.device)

    @cached_property
    def shared_keys(self) -> tuple[SharedKeys, ...]:
        """The tokens with descendants in other runs, in parts of similar numbers of these."""
        device = self.key_index.device
        return tuple(
            SharedKeys(
                onto(tokens, device),
                onto(places, device),
                None if counted.all() else onto(counted, device),
            )
            for tokens, places, counted in self.runs.copies()
        )


def onto(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to `device` as a tensor, asynchronously on CUDA."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
