"""Numbers that a loss takes from all groups of an update, computed before their gradients.

Each function receives all groups of an update, of all processes, on the host and in the order of
the data, so that its results depend neither on micro-batches nor on the number of processes. What
it remembers from update to update is in `Memory`, which checkpoints contain.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from logratio.training.methods.logps import GroupLogps

Memory = dict[str, float]
"""Running numbers of a method, by name; empty at the start of a run."""

Statistics = Callable[..., dict[str, Tensor]]
"""Called with the groups of an update, the memory, and as keywords β, the method's options, and
`trains`: False in an evaluation. Each result is one number for the update, `[]`, or one for each
completion, `[N]`; all float64."""


def mean_reward(
    groups: GroupLogps, memory: Memory, *, beta: float, **_: float
) -> dict[str, Tensor]:
    """Return BCO's shift: the mean reward of all completions so far, with this update."""
    counted = groups.is_chosen + groups.is_rejected
    count = memory.get("count", 0.0) + float(counted.sum())
    total = float((beta * groups.logratios * counted).sum())
    earlier = memory.get("mean", 0.0) * memory.get("count", 0.0)
    memory |= {"count": count, "mean": (earlier + total) / max(count, 1.0)}
    return {"shift": torch.tensor(memory["mean"], dtype=torch.float64)}


def reference_point(groups: GroupLogps, memory: Memory, **_: float) -> dict[str, Tensor]:
    """Return KTO's reference point: the mean log-ratio of mismatched completions, at least 0."""
    counted = groups.is_mismatched
    mean = (groups.logratios * counted).sum() / counted.sum().clamp(min=1)
    return {"reference_point": mean.clamp(min=0)}


LEAST_SCALE = 0.01
"""β-DPO never makes β smaller than this part of it."""

NO_SPREAD = 1e-3
"""Standard deviation of D, in nats, that may be rounding, as at policy = reference: a draw by it
would differ with the number of processes, so β-DPO keeps all pairs."""


def beta_of_update(
    groups: GroupLogps,
    memory: Memory,
    *,
    alpha: float,
    momentum: float,
    keep: float,
    trains: bool,
    **_: float,
) -> dict[str, Tensor]:
    """Return the factor of β for an update of β-DPO, and the weight of each pair in its mean.

    The moving averages start with the first update, whose own numbers they are there; a spread of
    0, at policy = reference, is no start. The authors' code starts them at 0 and includes the
    update's own numbers, so its factor changes less by `momentum`. All pairs count in evaluations.
    """
    margins = groups.pairs().logratio_margins
    mean, spread = float(margins.mean()), float(margins.std(correction=0))
    earlier, width = memory.get("mean", mean), memory.get("spread", 0.0)
    width = width if width > NO_SPREAD else spread
    updates = memory.get("updates", 0.0)
    memory["mean"] = momentum * earlier + (1 - momentum) * mean
    memory["spread"] = momentum * width + (1 - momentum) * spread
    memory["updates"] = updates + 1
    kept = torch.ones(len(margins), dtype=torch.bool)
    if trains and width > NO_SPREAD:
        kept = _near(margins, earlier, width, round(keep * len(margins)), int(updates))
    scale = max(1 + alpha * (float(margins[kept].mean()) - earlier), LEAST_SCALE)
    share = kept.double() / kept.double().mean()
    scales = torch.tensor(scale, dtype=torch.float64)
    return {"scale": scales, "share": share.repeat_interleave(2)}


def _near(margins: Tensor, mean: float, spread: float, count: int, seed: int) -> Tensor:
    """Draw `count` pairs without replacement, bool `[B]`; at least one.

    A pair is drawn in proportion to the normal density of its margin: those with the largest sums
    of log density and Gumbel noise.
    """
    noise = np.random.default_rng(seed).gumbel(size=len(margins))
    scores = torch.from_numpy(noise) - ((margins - mean) / spread) ** 2 / 2
    kept = torch.zeros(len(margins), dtype=torch.bool)
    kept[scores.topk(max(count, 1)).indices] = True
    return kept


def reference_quantiles(groups: GroupLogps, memory: Memory, **_: float) -> dict[str, Tensor]:
    """Return, for both sides of a pair, the reference's margin with the rank of the policy's."""
    pairs = groups.pairs()
    own = pairs.policy_chosen_logps - pairs.policy_rejected_logps
    reference = pairs.reference_chosen_logps - pairs.reference_rejected_logps
    matched = _by_rank(own, reference)
    return {"quantile": matched.repeat_interleave(2)}


def partners(groups: GroupLogps, memory: Memory, **_: float) -> dict[str, Tensor]:
    """Return, for each completion, the log-ratio with its rank on the other side of the pairs."""
    pairs = groups.pairs()
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    sides = _by_rank(chosen, rejected), _by_rank(rejected, chosen)
    return {"partner": torch.stack(sides, 1).flatten()}


def _by_rank(own: Tensor, others: Tensor) -> Tensor:
    """Return for each of `own` the one of `others` with the same rank, `[B]`."""
    matched = torch.empty_like(others)
    matched[own.argsort(stable=True)] = others.sort().values
    return matched
