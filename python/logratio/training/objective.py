"""From log-probs of a batch to its losses and metrics, and the learning rate's schedule."""

import math
from typing import Any, Protocol

from torch import Tensor

from logratio.training.config import TrainConfig
from logratio.training.losses import PAIR_LOSSES, PairLogps, sft_loss
from logratio.training.metrics import demonstration_columns, pair_columns


class Objective(Protocol):
    """A loss of completions' log-probs, float64 `[N]` each, and what a run reports of it.

    Losses are made of one part of a micro-batch after the other, while a GPU has nothing else to
    do, so metrics are no part of it: they are made once an update, of all its groups.
    """

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """Return the loss of each group, `[B]`, from sums and numbers of counted tokens, `[N]`."""
        ...

    def columns(
        self, losses: Tensor, policy: Tensor, reference: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        """Return what is reported of each group, by name: `[B]` each, to be averaged."""
        ...


def make_objective(config: TrainConfig, beta: float) -> Objective:
    """Return the objective that `config.loss` names."""
    return _Demonstrations() if config.loss == "sft" else _Preferences(config, beta)


class _Demonstrations:
    """One completion a group, and no reference."""

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return sft_loss(policy, lengths)

    def columns(
        self, losses: Tensor, policy: Tensor, reference: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        return demonstration_columns(losses, policy, lengths)


class _Preferences:
    """Two completions a group: the chosen one, then the rejected one (see `check_groups`)."""

    def __init__(self, config: TrainConfig, beta: float) -> None:
        self._loss, self._beta = PAIR_LOSSES[config.loss], beta
        self._options: dict[str, Any] = {n: getattr(config, n) for n in self._loss.options}

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        pairs = self._pairs(policy, reference, lengths)
        return self._loss.function(pairs, beta=self._beta, **self._options)

    def columns(
        self, losses: Tensor, policy: Tensor, reference: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        pairs = self._pairs(policy, reference, lengths)
        return pair_columns(losses, pairs, self._loss.rewards(pairs, self._beta))

    def _pairs(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> PairLogps:
        """Tell chosen from rejected by their order: with a mask, the host waits for its size."""
        policies, references, counts = map(_sides, (policy, reference, lengths))
        return PairLogps(*policies, *references, *counts, self._loss.needs_reference)


def _sides(column: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is of chosen completions and what is of rejected ones, `[N]` to `[B]` each."""
    chosen, rejected = column.view(-1, 2).unbind(1)
    return chosen, rejected


def learning_rate(config: TrainConfig, done: int, updates: int) -> float:
    """Return the rate of the update after `done`: linear up, then a cosine down to 0."""
    warmup = math.ceil(config.warmup * updates)
    if done < warmup:
        return config.lr * (done + 1) / warmup
    progress_share = (done - warmup) / max(1, updates - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress_share))
