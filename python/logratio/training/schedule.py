"""The length of a run, and the learning rate of each of its updates."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from logratio.training.config import TrainConfig


@dataclass(frozen=True)
class RunLength:
    """The length of a run.

    Attributes:
        updates: Number of updates.
        epochs: Passes over the data, begun or finished.
        groups: Number of groups in all updates.
    """

    updates: int
    epochs: int
    groups: int

    @classmethod
    def of(cls, config: TrainConfig, groups: int) -> "RunLength":
        """Return the length of a run over `groups` groups.

        `max_steps` takes precedence over `epochs`, as in transformers: data is repeated or cut.
        """
        per_epoch = math.ceil(groups / config.batch_size)
        updates = config.max_steps or config.epochs * per_epoch
        whole, rest = divmod(updates, per_epoch)
        seen = whole * groups + rest * config.batch_size
        return cls(updates, math.ceil(updates / per_epoch), seen)


def warmup_updates(config: TrainConfig, updates: int) -> int:
    """Return the number of updates with a rising learning rate.

    Below 1 `config.warmup` is a share of `updates`, else a number, as in transformers.
    """
    return math.ceil(config.warmup * updates if config.warmup < 1 else config.warmup)


def learning_rate(config: TrainConfig, done: int, updates: int) -> float:
    """Return the learning rate of the update after `done` of `updates` updates.

    A linear warmup, then the decay that `config.lr_scheduler` names, from the peak `config.lr` down
    to `config.min_lr_rate` of it. "wsd" stays at the peak until the last `config.decay` of the
    updates (arXiv 2404.06395).
    """
    warmup = warmup_updates(config, updates)
    if done < warmup:
        return config.lr * (done + 1) / warmup
    left = max(1, updates - warmup)
    passed = (done - warmup) / left
    if config.lr_scheduler == "wsd":
        decay = config.decay if config.decay < 1 else config.decay / left
        high = FALLS[config.decay_type](max(0.0, 1 - (1 - passed) / decay))
    else:
        high = DECAYS[config.lr_scheduler](passed)
    return config.lr * (config.min_lr_rate + (1 - config.min_lr_rate) * high)


def _cosine(passed: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * passed))


def _linear(passed: float) -> float:
    return 1 - passed


def _constant(_: float) -> float:
    return 1.0


def _root(passed: float) -> float:
    return 1 - math.sqrt(passed)


DECAYS: Mapping[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
}
"""Shares of the peak, from the share of the updates after the warmup that have passed: [0, 1)."""
FALLS: Mapping[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "1-sqrt": _root,
}
"""The same for the last updates of "wsd", from the share of these that have passed."""
