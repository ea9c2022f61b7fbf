"""Weights of tokens in the sums of log-probs: those of methods, and those of turns."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logratio._rust import Store
from logratio.data.store.turn_weights import TurnWeights
from logratio.logps.batch import TargetTokens
from logratio.logps.sequences import onto


def length_desensitized(targets: TargetTokens, *, alpha: float, **_: Any) -> Tensor:
    r"""Return LD-DPO's weights, float64 `[S]`.

    A weight is 1 up to the length of the shorter completion of a pair, then :math:`\alpha`, Liu et
    al. 2024 (arXiv 2409.06411, eq. 11). Only counted tokens have a place and make a length. The
    same weights apply to policy and reference, so that the loss starts at ln 2.
    """
    rank, lengths = _ranks(targets)
    shorter = np.minimum.reduceat(lengths, targets.group_offsets[:-1])
    limit = np.repeat(shorter, np.diff(targets.group_offsets))
    owners = _owners(targets)
    return onto(np.where(rank < limit[owners], 1.0, alpha), targets.target_ids.device)


def down_sampled(targets: TargetTokens, **_: Any) -> Tensor:
    """Return SamPO's weights, float64 `[S]`.

    A weight is 1 for a random sample of as many tokens of each completion of a pair as the shorter
    has, else 0, Lu et al. 2024 (arXiv 2406.10957, eq. 7). Only counted tokens are sampled.
    The sample of a completion depends only on its row in the store and its length, so policy and
    reference share it, and it is the same in every epoch.
    """
    lengths = _ranks(targets)[1]
    shorter = np.minimum.reduceat(lengths, targets.group_offsets[:-1])
    kept = np.repeat(shorter, np.diff(targets.group_offsets))
    weights = np.zeros(len(targets.counted))
    for number, row in enumerate(targets.rows.tolist()):
        start, stop = targets.completion_offsets[number : number + 2]
        places = np.flatnonzero(targets.counted[start:stop]) + start
        drawn = np.random.default_rng(row).permutation(places)
        weights[drawn[: kept[number]]] = 1.0
    return onto(weights, targets.target_ids.device)


def _owners(targets: TargetTokens) -> np.ndarray:
    """The completion of each target, int64 `[S]`."""
    return np.repeat(np.arange(len(targets.rows)), np.diff(targets.completion_offsets))


def _ranks(targets: TargetTokens) -> tuple[np.ndarray, np.ndarray]:
    """Return two counts, int64 `[S]` and `[N]`.

    The first is the number of counted tokens before each target in its completion; the second, the
    number of counted tokens of each completion.
    """
    before = np.concatenate([[0], np.cumsum(targets.counted)])
    starts = before[targets.completion_offsets[:-1]]
    lengths = before[targets.completion_offsets[1:]] - starts
    return before[:-1] - starts[_owners(targets)], lengths


def weighted_sums(targets: TargetTokens, logps: Tensor, weights: Tensor | None) -> Tensor:
    """Sum the log-probs of each completion, `[S]` to float64 `[N]`, each times its weight."""
    return targets.sums(logps if weights is None else logps.double() * weights)


@dataclass(frozen=True)
class WeightedTurns:
    """The weights of turns as weights of the tokens of batches.

    Training and evaluations use it, so that both weigh the same tokens equally.

    Attributes:
        store: The groups; some turns have other weights than 0 and 1.
    """

    store: Store

    @classmethod
    def of(cls, store: Store) -> "WeightedTurns | None":
        """Return the weights of a store's turns; None: all are 0 or 1."""
        return cls(store) if store.is_weighted else None

    def of_tokens(self, targets: TargetTokens) -> Tensor:
        """Return the weight of each token, float64 `[S]`, on the device of `targets`."""
        weights = self._table.at(self.store.mask(targets.rows))
        return onto(weights, targets.target_ids.device)

    def lengths(self) -> Tensor:
        """Return the sum of the sizes of each completion's weights, float64 `[N]`, on the host."""
        sizes = self.store.completion_lengths().astype(np.int64)
        mask = self.store.mask(np.arange(len(sizes)))
        owners = np.repeat(np.arange(len(sizes)), sizes)
        return torch.from_numpy(np.bincount(owners, np.abs(self._table.at(mask)), len(sizes)))

    @cached_property
    def _table(self) -> TurnWeights:
        return TurnWeights.of(self.store)
