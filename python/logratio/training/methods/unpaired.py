"""Losses of single completions that are good (role "chosen") or bad (role "rejected")."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from logratio.training.methods.logps import GroupLogps


def kto_loss(
    groups: GroupLogps, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    r"""Return the KTO loss of each group, `[B]`.

    :math:`\lambda_D(1 - \sigma(\beta(r - z)))` for a good and
    :math:`\lambda_U(1 - \sigma(\beta(z - r)))` for a bad completion, Ethayarajh et al. 2024 (arXiv
    2402.01306, eq. 8). :math:`z` estimates the KL divergence from the reference: the mean
    log-ratio of mismatched completions of the update, at least 0, without a gradient.
    """
    gap = beta * (groups.logratios - groups.statistics["reference_point"])
    good = desirable_weight * groups.is_chosen * torch.sigmoid(-gap)
    return groups.per_group(good + undesirable_weight * groups.is_rejected * torch.sigmoid(gap))


def bco_unpaired_loss(groups: GroupLogps, *, beta: float) -> Tensor:
    r"""Return the BCO loss of each group, `[B]`.

    :math:`-\log\sigma(\beta r - \delta)` for a good and :math:`-\log\sigma(\delta - \beta r)` for a
    bad completion: see `pairs.bco_loss`. The paper's weights for prompts that differ between good
    and bad completions are not applied.
    """
    gap = beta * groups.logratios - groups.statistics["shift"]
    losses = groups.is_chosen * logsigmoid(gap) + groups.is_rejected * logsigmoid(-gap)
    return -groups.per_group(losses)


def apo_zero_unpaired_loss(groups: GroupLogps, *, beta: float) -> Tensor:
    r"""Return the unpaired APO-zero loss of each group, `[B]`.

    :math:`1 - \sigma(\beta r)` for a good and :math:`\sigma(\beta r)` for a bad completion (arXiv
    2408.06266, section 3): see `pairs.apo_zero_loss`.
    """
    rewards = beta * groups.logratios
    good = groups.is_chosen * torch.sigmoid(-rewards)
    return groups.per_group(good + groups.is_rejected * torch.sigmoid(rewards))


def aot_unpaired_loss(groups: GroupLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Return the unpaired AOT loss of each group, `[B]`.

    DPO's loss of the differences between the i-th largest log-ratio of the chosen and of the
    rejected completions of an update, Melnyk et al. 2024 (arXiv 2406.05882, eq. 7). A completion is
    compared with a partner of another group, so half of each loss is counted in either group, and
    the gradient of a completion is that of the whole loss.
    """
    own, partner = groups.logratios, groups.statistics["partner"]
    side = groups.is_chosen - groups.is_rejected
    margins = beta * side * (own - partner)
    kept, flipped = logsigmoid(margins), logsigmoid(-margins)
    whole = -(1 - label_smoothing) * kept - label_smoothing * flipped
    return groups.per_group(side.abs() * (whole - whole.detach() / 2))
