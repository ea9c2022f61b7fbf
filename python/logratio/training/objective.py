"""From log-probs of a batch to its losses and metrics, and the learning rate's schedule."""

import math
from collections.abc import Callable

from torch import Tensor

from logratio._rust import ROLES
from logratio.logps.tensors import TargetTokens
from logratio.training.config import TrainConfig
from logratio.training.losses import PAIR_LOSSES, PairLogps, sft_loss
from logratio.training.metrics import demonstration_metrics, pair_metrics

CHOSEN, REJECTED = ROLES.index("chosen"), ROLES.index("rejected")

Objective = Callable[[Tensor, Tensor, TargetTokens], tuple[Tensor, dict[str, Tensor]]]


def make_objective(config: TrainConfig, beta: float) -> Objective:
    """Return a function of (policy sums, reference sums, targets): losses and summed metrics."""

    def demonstrations(
        policy: Tensor, _reference: Tensor, targets: TargetTokens
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses = sft_loss(policy, targets.lengths)
        return losses, demonstration_metrics(losses, policy, targets.lengths)

    if config.loss == "sft":
        return demonstrations
    loss = PAIR_LOSSES[config.loss]
    options = {name: getattr(config, name) for name in loss.options}

    def preferences(
        policy: Tensor, reference: Tensor, targets: TargetTokens
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = pair_logps(policy, reference, targets, loss.needs_reference)
        losses = loss.function(pairs, beta=beta, **options)
        return losses, pair_metrics(losses, pairs, loss.rewards(pairs, beta))

    return preferences


def pair_logps(
    policy: Tensor, reference: Tensor, targets: TargetTokens, has_reference: bool
) -> PairLogps:
    """Pick chosen and rejected out of `[N]` sums by their roles."""
    chosen, rejected = targets.roles == CHOSEN, targets.roles == REJECTED
    return PairLogps(
        policy[chosen],
        policy[rejected],
        reference[chosen],
        reference[rejected],
        targets.lengths[chosen],
        targets.lengths[rejected],
        has_reference,
    )


def learning_rate(config: TrainConfig, done: int, updates: int) -> float:
    """Return the rate of the update after `done`: linear up, then a cosine down to 0."""
    warmup = math.ceil(config.warmup * updates)
    if done < warmup:
        return config.lr * (done + 1) / warmup
    progress_share = (done - warmup) / max(1, updates - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress_share))
