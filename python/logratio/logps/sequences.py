"""Prompts and completions as sequences of one variable-length call, and who is found where.

A prompt is a sequence whose queries and keys are its own tokens. Each of its completions is
another: its queries are its own tokens, its keys those of the prompt and then its own, so that
causal attention aligned at the end lets each token see its prompt, what came before it, and itself.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
