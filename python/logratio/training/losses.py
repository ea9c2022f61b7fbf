r"""Preference losses: pure functions of log-probs, one number per pair.

Notation: :math:`l_w, l_l` are the summed log-probs of the chosen and the rejected completion under
the policy, :math:`r = l - l^{ref}` their log-ratios, `n` their numbers of counted tokens,
:math:`\beta` the weight of the KL term in the objective: a larger one keeps the policy closer to
the reference. A loss averages over the pairs of an update, never over a micro-batch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogps:
    """What a pair loss may look at, each float64 `[B]`, in nats and tokens.

    The reference's log-probs are zeros for a loss that has none.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    has_reference: bool = True

    @property
    def chosen_logratios(self) -> Tensor:
        """Policy minus reference, of the chosen completion."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """Policy minus reference, of the rejected completion."""
        return self.policy_rejected_logps - self.reference_rejected_logps


def dpo_loss(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    r"""Return the DPO loss of each pair, `[B]`.

    :math:`-(1-\epsilon) \log\sigma(\beta(r_w - r_l)) - \epsilon \log\sigma(-\beta(r_w - r_l))`,
    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); :math:`\epsilon > 0` is cDPO, for labels of
    which that share is flipped. At policy = reference: ln 2.
    """
    margins = beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    kept, flipped = logsigmoid(margins), logsigmoid(-margins)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def ipo_loss(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Return the IPO loss of each pair, `[B]`.

    :math:`(r_w/n_w - r_l/n_l - 1/(2\beta))^2`, Azar et al. 2023 (arXiv 2310.12036, eq. 17), with
    log-ratios per token as its authors advise. At policy = reference: :math:`1/(4\beta^2)`.
    """
    chosen = pairs.chosen_logratios / pairs.chosen_lengths
    rejected = pairs.rejected_logratios / pairs.rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(
    pairs: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    r"""Return the SimPO loss of each pair, `[B]`; it has no reference.

    :math:`-\log\sigma(\beta(l_w/n_w - l_l/n_l) - \gamma)`, Meng et al. 2024 (arXiv 2405.14734,
    eq. 6), smoothed as in `dpo_loss`. Its value at the start depends on the data.
    """
    chosen = pairs.policy_chosen_logps / pairs.chosen_lengths
    rejected = pairs.policy_rejected_logps / pairs.rejected_lengths
    margins = beta * (chosen - rejected) - gamma
    kept, flipped = logsigmoid(margins), logsigmoid(-margins)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def sft_loss(policy_logps: Tensor, lengths: Tensor) -> Tensor:
    """Return the negative mean log-prob per token of each demonstration, `[N]`."""
    return -policy_logps / lengths


PairRewards = tuple[Tensor, Tensor]
"""Rewards of the chosen and of the rejected completions, `[B]` each."""


def implicit_rewards(pairs: PairLogps, beta: float) -> PairRewards:
    """Return β × log-ratio of each completion: what is exported and served."""
    return beta * pairs.chosen_logratios, beta * pairs.rejected_logratios


def mean_rewards(pairs: PairLogps, beta: float) -> PairRewards:
    """Return β × mean log-prob per token: SimPO's rewards (eq. 4)."""
    chosen = pairs.policy_chosen_logps / pairs.chosen_lengths
    return beta * chosen, beta * pairs.policy_rejected_logps / pairs.rejected_lengths


def gradient_weight(chosen: Tensor, rejected: Tensor) -> Tensor:
    r"""Return :math:`\sigma(\hat r_l - \hat r_w)` of two rewards, `[B]`.

    DPO's weight on a pair's gradient: 1/2 at the start, near 0 when learned.
    """
    return torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class PairLoss:
    """A pair loss with what the trainer must know of it.

    Attributes:
        function: the loss.
        default_beta: used where none is given; β is not comparable across losses.
        options: keywords beside `beta` that `function` takes.
        needs_reference: False for a loss without reference log-probs.
        rewards: the rewards whose margin it works on, which the metrics report.
        initial_value: its value where policy = reference, as a function of β; None if it has none.
    """

    function: Callable[..., Tensor]
    default_beta: float
    options: frozenset[str] = frozenset()
    needs_reference: bool = True
    initial_value: Callable[[float], float] | None = None
    rewards: Callable[[PairLogps, float], PairRewards] = implicit_rewards


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "dpo": PairLoss(dpo_loss, 0.1, frozenset({"label_smoothing"}), True, lambda _: math.log(2)),
    "ipo": PairLoss(ipo_loss, 0.1, initial_value=lambda beta: 1 / (4 * beta**2)),
    "simpo": PairLoss(
        simpo_loss, 2.0, frozenset({"label_smoothing", "gamma"}), False, None, mean_rewards
    ),
}
LOSSES = (*PAIR_LOSSES, "sft")
