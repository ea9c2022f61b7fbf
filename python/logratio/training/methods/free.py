"""Losses without a reference: margins of the policy's own log-probs, imitation, reward models."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from logratio.training.methods.logps import GroupLogps, PairLogps
from logratio.training.methods.margins import logistic, tangent_expm1


def mean_logps(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Return the mean log-prob per token of chosen and rejected completions, `[B]` each."""
    chosen = pairs.policy_chosen_logps / pairs.chosen_lengths
    return chosen, pairs.policy_rejected_logps / pairs.rejected_lengths


def simpo_loss(
    pairs: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    r"""Return the SimPO loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta(l_w/n_w - l_l/n_l) - \gamma)`, Meng et al. 2024 (arXiv 2405.14734,
    eq. 6), with label smoothing as in `dpo_loss`. Its initial value depends on the data.

    Args:
        pairs: The policy's log-probs and lengths of the pairs.
        beta: Scale of the rewards, :math:`\beta`.
        gamma: Target margin, :math:`\gamma`.
        label_smoothing: Share of flipped labels, in [0, 0.5).
    """
    chosen, rejected = mean_logps(pairs)
    return logistic(beta * (chosen - rejected) - gamma, label_smoothing)


def alpha_po_loss(pairs: PairLogps, *, beta: float, gamma: float, alpha: float) -> Tensor:
    r"""Return the AlphaPO loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta(R_w - R_l) - \gamma)` with
    :math:`R = (1 - \bar p^{-\alpha})/\alpha`, where :math:`\bar p` is the geometric mean of the
    tokens' probabilities, Gupta et al. 2025 (arXiv 2501.03884, eq. 7). Near
    :math:`\alpha = 0` it is SimPO. Above `margins.CLIMB`, the exponential of
    :math:`-\alpha \log\bar p` is a straight line, so that loss and gradient stay finite.
    """
    chosen, rejected = (tangent_expm1(-alpha * mean) for mean in mean_logps(pairs))
    return logistic(beta * (rejected - chosen) / alpha - gamma)


def cpo_loss(pairs: PairLogps, *, beta: float, label_smoothing: float, alpha: float) -> Tensor:
    r"""Return the CPO loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta(l_w - l_l)) - \alpha\, l_w/n_w`, Xu et al. 2024 (arXiv 2401.08417, eq.
    6). The likelihood term is a mean per token of each pair; TRL's is one over the micro-batch.
    """
    margins = beta * (pairs.policy_chosen_logps - pairs.policy_rejected_logps)
    return logistic(margins, label_smoothing) - alpha * mean_logps(pairs)[0]


SUREST = -1e-9
"""Highest mean log-prob whose odds are computed: beyond, the odds are infinite."""


def log_odds(mean: Tensor) -> Tensor:
    """Return the log of p / (1 - p) for mean log-probs log p, `[B]`."""
    mean = mean.clamp(max=SUREST)
    return mean - torch.log(-torch.expm1(mean))


def orpo_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the ORPO loss of each pair, `[B]`.

    :math:`-l_w/n_w - \beta\log\sigma(\log\mathrm{odds}_w - \log\mathrm{odds}_l)`, Hong et al. 2024
    (arXiv 2403.07691, eq. 6 and 7; :math:`\beta` is its :math:`\lambda`), with the odds of the mean
    log-prob per token. The first term covers the completion; TRL's covers the prompt too.
    """
    chosen, rejected = mean_logps(pairs)
    return beta * logistic(log_odds(chosen) - log_odds(rejected)) - chosen


def slic_loss(pairs: PairLogps, *, delta: float, weight: float) -> Tensor:
    r"""Return the SLiC-HF loss of each pair, `[B]`.

    :math:`\max(0, \delta - l_w + l_l) - \lambda\, l_w`, Zhao et al. 2023 (arXiv 2305.10425, eq. 1),
    with the chosen completion as the target of the regularization.
    """
    gap = pairs.policy_chosen_logps - pairs.policy_rejected_logps
    return torch.relu(delta - gap) - weight * pairs.policy_chosen_logps


def unlikelihood_loss(pairs: PairLogps, *, alpha: float) -> Tensor:
    r"""Return the unlikelihood baseline of the DPO paper for each pair, `[B]`.

    :math:`-l_w + \alpha\, l_l` (arXiv 2305.18290, section 6). It has no lower bound: with
    :math:`\alpha` near 1, rejected log-probs fall without end and the policy collapses.
    """
    return alpha * pairs.policy_rejected_logps - pairs.policy_chosen_logps


def sft_loss(policy_logps: Tensor, lengths: Tensor) -> Tensor:
    """Return the negative mean log-prob per token of each demonstration, `[N]`.

    Args:
        policy_logps: Summed log-probs, in nats, `[N]`.
        lengths: Numbers of counted tokens, `[N]`.
    """
    return -policy_logps / lengths


def imitation_loss(groups: GroupLogps) -> Tensor:
    """Return `sft_loss` of the first completion of each group, `[B]`: the chosen or the best."""
    first = groups.table(sft_loss(groups.policy_logps, groups.lengths), 0.0)
    return first[:, 0]


def bradley_terry_loss(pairs: PairLogps, *, center: float = 0.0) -> Tensor:
    r"""Return the negative log-likelihood of each pair under the Bradley-Terry model, `[B]`.

    :math:`-\log\sigma(s_w - s_l) + c\,(s_w + s_l)^2`: Rafailov et al. 2023 (arXiv 2305.18290, eq.
    2), after Bradley & Terry 1952; the second term keeps the scores of a pair around 0, as TRL's
    `center_rewards_coefficient`. At equal scores of 0: ln 2.

    Args:
        pairs: The pairs; `policy_chosen_logps` and `policy_rejected_logps` are the scores.
        center: Weight of the second term, :math:`c`.

    Example:
        >>> zeros, lengths = torch.zeros(1, dtype=torch.float64), torch.tensor([4.0])
        >>> bradley_terry_loss(PairLogps(zeros, zeros, zeros, zeros, lengths, lengths))
        tensor([0.6931], dtype=torch.float64)
    """
    chosen, rejected = pairs.policy_chosen_logps, pairs.policy_rejected_logps
    return -logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2
