"""The results of an evaluation on held-out pairs: accuracy, margins, calibration, per source."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from logratio._rust import ROLES, Store
from logratio.data.analysis.distributions import Calibration, calibration
from logratio.forecast import count
from logratio.intervals import Interval, wilson


@dataclass(frozen=True)
class KlEstimate:
    """Monte Carlo estimate of the KL divergence of the policy from the reference.

    Attributes:
        nats: Mean of log π − log π_ref per completion, over completions sampled from the policy.
        standard_error: Standard error of that mean; NaN for a single sample.
        samples: Number of sampled completions.
        mean_length: Mean length of the completions, in tokens.
    """

    nats: float
    standard_error: float
    samples: int
    mean_length: float


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out pairs.

    A policy's rewards are β × log-ratio, in nats × β; a reward model's are its scores.

    Attributes:
        pairs: Number of pairs.
        beta: β of the rewards; None for a reward model.
        accuracy: Share of pairs whose chosen reward is higher; a tie counts half.
        accuracy_standard_error: Binomial standard error of `accuracy`, which is 0 if `accuracy` is
            0 or 1: the interval is the better measure.
        accuracy_interval: 95 % interval of `accuracy`, by Wilson: see `wilson`.
        margin: Mean of chosen minus rejected reward.
        reward_chosen, reward_rejected: Mean rewards.
        logratio_chosen, logratio_rejected: Mean log-ratios, in nats per completion; None for a
            reward model.
        length_chosen, length_rejected: Mean number of counted tokens, each times the size of its
            turn's weight.
        calibration: Calibration of σ(margin).
        kl: KL divergence from the reference; None if no samples were requested.
        sources: Number of pairs and accuracy of each input file.
    """

    pairs: int
    beta: float | None
    accuracy: float
    accuracy_standard_error: float
    accuracy_interval: Interval
    margin: float
    reward_chosen: float
    reward_rejected: float
    logratio_chosen: float | None
    logratio_rejected: float | None
    length_chosen: float
    length_rejected: float
    calibration: Calibration
    kl: KlEstimate | None
    sources: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        beta = "" if self.beta is None else f", beta {self.beta:g}"
        return (
            f"Evaluation({count(self.pairs, 'pair')}, accuracy {self.accuracy:.3f}, "
            f"margin {self.margin:.4g}{beta})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the results as a dict that can be written as JSON."""
        return asdict(self)


def summarize(
    store: Store,
    values: np.ndarray,
    beta: float | None,
    kl: KlEstimate | None = None,
    lengths: np.ndarray | None = None,
) -> Evaluation:
    """Summarize an evaluation of a store of pairs.

    Args:
        store: The pairs.
        values: Log-ratio of each completion, `[N]`; or its score, if `beta` is None.
        beta: Reward per nat of log-ratio; None: the values are rewards.
        kl: The policy's KL divergence from the reference, if it was estimated.
        lengths: Length of each completion, `[N]`, with weights of turns; None: counted tokens.
    """
    roles, lengths = store.roles(), store.counted_lengths() if lengths is None else lengths
    chosen, rejected = roles == ROLES.index("chosen"), roles == ROLES.index("rejected")
    rewards = values if beta is None else beta * values
    margins = rewards[chosen] - rewards[rejected]
    right = (np.sign(margins) + 1) / 2
    accuracy = float(right.mean())
    return Evaluation(
        pairs=len(margins),
        beta=beta,
        accuracy=accuracy,
        accuracy_standard_error=float(np.sqrt(accuracy * (1 - accuracy) / len(margins))),
        accuracy_interval=wilson(accuracy, len(margins)),
        margin=float(margins.mean()),
        reward_chosen=float(rewards[chosen].mean()),
        reward_rejected=float(rewards[rejected].mean()),
        logratio_chosen=None if beta is None else float(values[chosen].mean()),
        logratio_rejected=None if beta is None else float(values[rejected].mean()),
        length_chosen=float(lengths[chosen].mean()),
        length_rejected=float(lengths[rejected].mean()),
        calibration=calibration(margins),
        kl=kl,
        sources=by_source(store, right),
    )


def by_source(store: Store, values: np.ndarray) -> dict[str, tuple[int, float]]:
    """Return the number of groups and the mean value of each input file, by its name.

    Args:
        store: The groups.
        values: One value per group, `[G]`.
    """
    files, _ = store.sources()
    paths = json.loads(store.metadata or "{}").get("files", [])
    names = [Path(path).name for path in paths]
    if len({*names}) < len(names):  # only their folders differ
        names = paths
    return {
        names[one] if one < len(names) else "?": (
            int((files == one).sum()),
            float(values[files == one].mean()),
        )
        for one in np.unique(files)
    }
