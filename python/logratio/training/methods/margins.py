"""Pair losses that are a logistic loss of one margin: DPO, and methods that change its margin."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from logratio.training.methods.logps import GroupLogps, PairLogps


def logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Return :math:`-(1-\epsilon)\log\sigma(m) - \epsilon\log\sigma(-m)` of margins, `[B]`."""
    if not label_smoothing:
        return -logsigmoid(margins)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def dpo_loss(pairs: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    r"""Return the DPO loss of each pair, `[B]`.

    :math:`-(1-\epsilon) \log\sigma(\beta(r_w - r_l)) - \epsilon \log\sigma(-\beta(r_w - r_l))`,
    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7). :math:`\epsilon > 0` gives cDPO, for data in
    which that share of the labels is flipped. At policy = reference: ln 2.

    Args:
        pairs: Log-probs of the pairs.
        beta: Weight of the KL term, :math:`\beta`.
        label_smoothing: Share of flipped labels, :math:`\epsilon`, in [0, 0.5).

    Example:
        >>> logps = torch.tensor([-12.0], dtype=torch.float64)
        >>> dpo_loss(PairLogps(logps, logps, logps, logps, *[torch.tensor([4.0])] * 2))
        tensor([0.6931], dtype=torch.float64)
    """
    return logistic(beta * pairs.logratio_margins, label_smoothing)


def robust_dpo_loss(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Return the robust DPO loss of each pair, `[B]`.

    :math:`[-(1-\epsilon)\log\sigma(\beta D) + \epsilon\log\sigma(-\beta D)] / (1-2\epsilon)`, Ray
    Chowdhury et al. 2024 (arXiv 2403.00409, eq. 12): an unbiased estimate of the loss on clean
    labels if the share :math:`\epsilon < 1/2` of the labels is flipped. It may be negative.
    """
    margins = beta * pairs.logratio_margins
    kept, flipped = logsigmoid(margins), logsigmoid(-margins)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def ln_dpo_loss(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Return the length-normalized DPO loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta(r_w/n_w - r_l/n_l))` (arXiv 2411.15124, section 5.1.2; TRL's
    "sigmoid_norm").
    """
    chosen = pairs.chosen_logratios / pairs.chosen_lengths
    return logistic(
        beta * (chosen - pairs.rejected_logratios / pairs.rejected_lengths), label_smoothing
    )


def r_dpo_loss(pairs: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Return the length-regularized DPO loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta D + \alpha(n_w - n_l))`, Park et al. 2024 (arXiv 2403.19159, eq. 9). A
    reward with a penalty of :math:`\alpha` per token is
    :math:`\beta r + \alpha n` of its optimal policy, hence the sign: the more a chosen completion
    is longer, the less must its log-ratio be higher.
    """
    lengths = pairs.chosen_lengths - pairs.rejected_lengths
    return logistic(beta * pairs.logratio_margins + alpha * lengths)


def dpop_loss(pairs: PairLogps, *, beta: float, penalty: float) -> Tensor:
    r"""Return the DPO-Positive loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta[D - \lambda\max(0, -r_w)])`, Pal et al. 2024 (arXiv 2402.13228, eq. 3):
    the chosen completion must not become less likely than under the reference. The penalty is
    inside the log-sigmoid; some implementations have it outside.
    """
    fallen = torch.relu(-pairs.chosen_logratios)
    return logistic(beta * (pairs.logratio_margins - penalty * fallen))


def odpo_loss(pairs: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Return the loss of DPO with an offset, `[B]`.

    :math:`-\log\sigma(\beta D - \alpha\log\Delta)`, Amini et al. 2024 (arXiv 2402.10571, eq. 8),
    where :math:`\Delta > 0` is the margin of the pair in the data.
    """
    assert pairs.margins is not None
    return logistic(beta * pairs.logratio_margins - alpha * pairs.margins.log())


def wpo_loss(groups: GroupLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Return the WPO loss of each pair, `[B]`.

    DPO's loss times :math:`w_w w_l` with
    :math:`w = \exp\frac1n\sum_t[\log\pi(y_t) - \log\sum_v\pi(v)^2]` of each completion, Zhou et al.
    2024 (arXiv 2406.11827, eq. 4): pairs that the policy itself might write weigh more. Weights
    have no gradient, and are 1 where `confidences` are not known, as in evaluations.
    """
    losses = logistic(beta * groups.pairs().logratio_margins, label_smoothing)
    if groups.confidences is None:
        return losses
    return losses * groups.per_group(groups.confidences).exp()


def tdpo1_loss(groups: GroupLogps, *, beta: float) -> Tensor:
    r"""Return the TDPO1 loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta[D + K_w - K_l])`, Zeng et al. 2024 (arXiv 2404.11999, eq. 15), where
    :math:`K = \sum_t \mathrm{KL}(\pi_\mathrm{ref} \| \pi)` over the tokens of a completion. Without
    divergences, as in evaluations, it is DPO.
    """
    margins = groups.pairs().logratio_margins
    if groups.divergences is not None:
        chosen, rejected = groups.divergences.view(-1, 2).unbind(1)
        margins = margins + chosen - rejected
    return logistic(beta * margins)


def tdpo2_loss(groups: GroupLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Return the TDPO2 loss of each pair, `[B]`.

    :math:`-\log\sigma(\beta[D + \alpha(\mathrm{sg}(K_w) - K_l)])`, Zeng et al. 2024 (arXiv
    2404.11999, eq. 17): the chosen completion's divergence has no gradient. See `tdpo1_loss`.
    """
    margins = groups.pairs().logratio_margins
    if groups.divergences is not None:
        chosen, rejected = groups.divergences.view(-1, 2).unbind(1)
        margins = margins + alpha * (chosen.detach() - rejected)
    return logistic(beta * margins)


CLIMB = 30.0
"""Exponents from which `tangent_expm1` is straight."""


def tangent_expm1(exponent: Tensor) -> Tensor:
    """Return exp - 1, but its tangent above `CLIMB`, so that values and gradients stay finite.

    The losses use differences of exponentials, in which the 1 cancels. Without it, they keep their
    digits where the exponents are near 0.
    """
    # Below, relu has no gradient; one of exponent - clamp would cancel only up to e^30 · 1e-16.
    return exponent.clamp(max=CLIMB).expm1() + math.exp(CLIMB) * torch.relu(exponent - CLIMB)


def chi_po_loss(pairs: PairLogps, *, beta: float, clip: float) -> Tensor:
    r"""Return the χPO loss of each pair, `[B]`.

    :math:`-\log\sigma(\mathrm{clip}_{c}[\beta\phi(e^{r_w}) - \beta\phi(e^{r_l})])` with
    :math:`\phi(z) = z + \log z`, Huang et al. 2024 (arXiv 2407.13399, eq. 9), where :math:`c` is
    twice the largest reward. Beyond the clip a pair has no gradient. Above a log-ratio of `CLIMB`,
    its exponential is a straight line.
    """
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    linked = tangent_expm1(chosen) + chosen - tangent_expm1(rejected) - rejected
    return logistic((beta * linked).clamp(-clip, clip))


def forward_kl_dpo_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the f-DPO loss for the forward KL divergence, `[B]`.

    :math:`-\log\sigma(\beta[f'(e^{r_w}) - f'(e^{r_l})])` with :math:`f'(u) = -1/u`, Wang et al.
    2023 (arXiv 2309.16240, eq. 8 and table 1). Below a log-ratio of -`CLIMB`, :math:`f'` is a
    straight line, so that loss and gradient stay finite.
    """
    linked = tangent_expm1(-pairs.rejected_logratios) - tangent_expm1(-pairs.chosen_logratios)
    return logistic(beta * linked)


def js_dpo_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the f-DPO loss for the Jensen-Shannon divergence, `[B]`.

    As `forward_kl_dpo_loss`, with :math:`f'(u) = \log(2u / (1 + u))`.
    """
    linked = logsigmoid(pairs.chosen_logratios) - logsigmoid(pairs.rejected_logratios)
    return logistic(beta * linked)


def alpha_dpo_loss(pairs: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Return the f-DPO loss for the α-divergence, `[B]`.

    As `forward_kl_dpo_loss`, with :math:`f'(u) = (1 - u^{-\alpha})/\alpha`, where :math:`\alpha` is
    in (0, 1): near 0 it is DPO, at 1 the forward KL. TRL's `f_alpha_divergence_coef` is
    :math:`1 - \alpha` since 1.0.
    """
    chosen, rejected = -alpha * pairs.chosen_logratios, -alpha * pairs.rejected_logratios
    return logistic(beta * (tangent_expm1(rejected) - tangent_expm1(chosen)) / alpha)


def beta_dpo_loss(pairs: PairLogps, *, beta: float) -> Tensor:
    r"""Return the β-DPO loss of each pair, `[B]`.

    :math:`-s\log\sigma(\beta_u D)` with one :math:`\beta_u = \beta[1 + \alpha(\bar D - M)]` for
    each update, where :math:`\bar D` is the mean of :math:`D` over the pairs that are kept and
    :math:`M` the moving average of its mean over earlier updates, Wu et al. 2024 (arXiv 2407.08639,
    eq. 6). The paper's filter keeps a share of the pairs, with a probability in proportion to
    :math:`\exp(-(D - M)^2/(2\sigma^2))`: :math:`s` is 0 for the others, and such that the mean loss
    is that of the pairs that are kept. See `statistics.beta_of_update`.
    """
    losses = logistic(beta * pairs.statistics["scale"] * pairs.logratio_margins)
    return losses * pairs.statistics["share"]


def aot_loss(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Return the AOT loss of each pair, `[B]`.

    DPO's loss of :math:`(l_w - l_l) - q`, where :math:`q` is the difference of the reference's
    log-probs with the same rank among all pairs of the update, Melnyk et al. 2024 (arXiv
    2406.05882, eq. 8, paired). It depends on the pairs of an update, not on micro-batches.
    """
    own = pairs.policy_chosen_logps - pairs.policy_rejected_logps
    return logistic(beta * (own - pairs.statistics["quantile"]), label_smoothing)
