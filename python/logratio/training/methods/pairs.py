"""Pair losses with a reference that are not a logistic loss of one margin."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from logratio.training.methods.logps import PairLogps
from logratio.training.methods.margins import tangent_expm1


def ipo_loss(pairs: PairLogps, *, beta: float = 0.1) -> Tensor:
    r"""Return the IPO loss of each pair, `[B]`.

    :math:`(r_w/n_w - r_l/n_l - 1/(2\beta))^2`, Azar et al. 2023 (arXiv 2310.12036, eq. 17), with
    log-ratios per token as its authors advise. At policy = reference: :math:`1/(4\beta^2)`.

    Args:
        pairs: Log-probs and lengths of the pairs.
        beta: Weight of the KL term, :math:`\beta`.
    """
    chosen = pairs.chosen_logratios / pairs.chosen_lengths
    rejected = pairs.rejected_logratios / pairs.rejected_lengths
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def ipo_sum_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the IPO loss of each pair with summed log-ratios, `[B]`.

    :math:`(D - 1/(2\beta))^2`: the paper's equation as it is printed (see `ipo_loss`).
    """
    return (pairs.logratio_margins - 1 / (2 * beta)) ** 2


def hinge_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the hinge loss of each pair, `[B]`.

    :math:`\max(0, 1 - \beta D)`, "hinge-norm" of RSO, Liu et al. 2023 (arXiv 2309.06657, eq. 9).
    """
    return torch.relu(1 - beta * pairs.logratio_margins)


def exo_loss(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Return the EXO loss of each pair, `[B]`.

    The reverse KL divergence between :math:`(\sigma(\beta D), \sigma(-\beta D))` and
    :math:`(1-\epsilon, \epsilon)`, Ji et al. 2024 (arXiv 2402.00856, eq. 16). :math:`\epsilon > 0`.
    """
    margins = beta * pairs.logratio_margins
    kept, flipped = logsigmoid(margins), logsigmoid(-margins)
    right = kept.exp() * (kept - math.log(1 - label_smoothing))
    return right + flipped.exp() * (flipped - math.log(label_smoothing))


def nca_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the NCA loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta r_w) - \frac12\log\sigma(-\beta r_w) - \frac12\log\sigma(-\beta r_l)`,
    Chen et al. 2024 (arXiv 2402.05369, eq. 13 for K = 2).
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


def bco_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the BCO loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta r_w - \delta) - \log\sigma(-(\beta r_l - \delta))`, Jung et al. 2024
    (arXiv 2404.04656, eq. 11), where :math:`\delta` is the mean reward of all updates so far, this
    one included: see `statistics.mean_reward`. TRL 1.16 has no :math:`\delta`.
    """
    shift = pairs.statistics["shift"]
    chosen = beta * pairs.chosen_logratios - shift
    return -logsigmoid(chosen) - logsigmoid(shift - beta * pairs.rejected_logratios)


def sppo_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the loss of SPPO with hard labels, `[B]`.

    :math:`(r_w - \frac1{2\beta})^2 + (r_l + \frac1{2\beta})^2`, Wu et al. 2024 (arXiv 2405.00675,
    eq. 4.9), whose :math:`\eta` is :math:`1/\beta`.
    """
    target = 1 / (2 * beta)
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def cal_dpo_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the calibrated DPO loss of each pair, `[B]`.

    :math:`-\log\sigma(D) + (r_w - \frac1{2\beta})^2 + (r_l + \frac1{2\beta})^2`, Xiao et al. 2024
    (arXiv 2412.14516, eq. 9): :math:`\beta` is in the targets only.
    """
    return sppo_loss(pairs, beta=beta) - logsigmoid(pairs.logratio_margins)


def apo_zero_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the APO-zero loss of each pair, `[B]`.

    :math:`1 - \sigma(\beta r_w) + \sigma(\beta r_l)`, D'Oosterlinck et al. 2024 (arXiv 2408.06266,
    eq. 7): for chosen completions that are better than the policy's own.
    """
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the APO-down loss of each pair, `[B]`.

    :math:`\sigma(\beta r_w) + 1 - \sigma(\beta D)`, D'Oosterlinck et al. 2024 (arXiv 2408.06266,
    eq. 8): for chosen completions that are worse than the policy's own. It lowers both log-probs.
    """
    return torch.sigmoid(beta * pairs.chosen_logratios) + torch.sigmoid(
        -beta * pairs.logratio_margins
    )


def unweighted_dpo_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return a loss whose gradient is DPO's without the weight of each pair, `[B]`.

    :math:`-\beta D` (arXiv 2305.18290, section 4): without the weight :math:`\sigma(-\beta D)`,
    learned pairs are pushed apart without end, and the policy degenerates. For study.
    """
    return -beta * pairs.logratio_margins


def discopop_loss(pairs: PairLogps, *, beta: float, tau: float) -> Tensor:
    r"""Return the DiscoPOP loss of each pair, `[B]`.

    :math:`-(1-m)\log\sigma(\beta D) + m e^{-\beta D}` with :math:`m = \sigma(\beta D/\tau)`, Lu et
    al. 2024 (arXiv 2406.08414, eq. 5), which a language model found. The second term is bounded for
    :math:`\tau \le 1`; for a larger one, it is a straight line above :math:`e^{30}`.
    """
    margins = beta * pairs.logratio_margins
    # Multiplied as exponents: m falls faster than exp(-margins) grows, but each alone overflows.
    exponential = 1 + tangent_expm1(logsigmoid(margins / tau) - margins)
    return exponential - torch.sigmoid(-margins / tau) * logsigmoid(margins)
