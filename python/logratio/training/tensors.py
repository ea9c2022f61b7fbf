"""Layouts from Rust as torch tensors: no copy on the CPU, one copy to another device."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from logratio._rust import PaddedLayout, SharedLayout


@dataclass(frozen=True)
class TargetTokens:
    """The scored tokens of a batch, flat and group-major: `S` targets of `N` completions.

    Attributes:
        logit_index: int64 `[S]`, position (in the flattened batch) that predicts each target.
        target_ids: int64 `[S]`.
        completion_mask: bool `[S]`, False on tokens that do not count.
        completion_of: int64 `[S]`, number of the completion each target belongs to.
        roles: int64 `[N]`, index into `logratio._rust.ROLES`.
        rows: int64 numpy `[N]`, row of each completion in the store; on the host.
        groups: int64 numpy `[G]`, group numbers in the store.
    """

    logit_index: Tensor
    target_ids: Tensor
    completion_mask: Tensor
    completion_of: Tensor
    roles: Tensor
    rows: np.ndarray
    groups: np.ndarray

    def sums(self, per_token_logps: Tensor) -> Tensor:
        """Add up the tokens that count: float32 `[S]` to `[N]`."""
        counted = torch.where(self.completion_mask, per_token_logps, 0.0)
        zeros = counted.new_zeros(len(self.roles))
        return zeros.index_add(0, self.completion_of, counted)

    @cached_property
    def lengths(self) -> Tensor:
        """Count the tokens that count, float32 `[N]`."""
        return self.sums(torch.ones_like(self.target_ids, dtype=torch.float32))


@dataclass(frozen=True)
class SharedBatch:
    """Groups end to end in one row: each prompt once, then its completions.

    Attributes:
        input_ids: int64 `[1, T]`.
        position_ids: int64 `[1, T]`, restarting at the prompt's length for each completion.
        prompt_lengths: prompt tokens of each group, on the host.
        completion_lengths: for each group, the tokens of each of its completions, on the host.
        targets: the scored tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompt_lengths: list[int]
    completion_lengths: list[list[int]]
    targets: TargetTokens


@dataclass(frozen=True)
class PaddedBatch:
    """One right-padded row per completion: int64 `[N, T]` each, and the scored tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: TargetTokens


Batch = SharedBatch | PaddedBatch


def to_torch(layout: SharedLayout | PaddedLayout, device: torch.device | str = "cpu") -> Batch:
    """Wrap a layout's buffers as tensors on `device`."""
    targets = _targets(layout, device)
    if isinstance(layout, SharedLayout):
        return SharedBatch(
            input_ids=_tensor(layout.input_ids, device)[None],
            position_ids=_tensor(layout.position_ids, device)[None],
            prompt_lengths=layout.prompt_lengths.tolist(),
            completion_lengths=_by_group(layout),
            targets=targets,
        )
    return PaddedBatch(
        input_ids=_tensor(layout.input_ids, device),
        attention_mask=_tensor(layout.attention_mask, device),
        position_ids=_tensor(layout.position_ids, device),
        targets=targets,
    )


def _targets(layout: SharedLayout | PaddedLayout, device: torch.device | str) -> TargetTokens:
    lengths = np.diff(layout.completion_offsets)
    return TargetTokens(
        logit_index=_tensor(layout.logit_index, device),
        target_ids=_tensor(layout.target_ids, device),
        completion_mask=_tensor(layout.completion_mask, device),
        completion_of=_tensor(np.repeat(np.arange(len(lengths)), lengths), device),
        roles=_tensor(layout.roles.astype(np.int64), device),
        rows=layout.completions,
        groups=layout.groups,
    )


def _by_group(layout: SharedLayout) -> list[list[int]]:
    ends = np.cumsum(layout.group_sizes)[:-1]
    return [part.tolist() for part in np.split(layout.completion_lengths, ends)]


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
