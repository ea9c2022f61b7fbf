"""Losses of whole lists: K completions of one prompt, of which the data says how good each is.

`GroupLogps.grades` has the order. A pair is a list of two. Completions with equal grades are not
compared with each other.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from logratio.training.methods.logps import GroupLogps

NONE = -torch.inf


def plackett_luce_loss(groups: GroupLogps, *, beta: float) -> Tensor:
    r"""Return the loss of DPO under the Plackett-Luce model for each list, `[B]`.

    :math:`-\sum_k \log\frac{e^{\beta r_k}}{\sum_{j \succeq k} e^{\beta r_j}}`, where the sum is
    over :math:`k` and all completions that are worse, Rafailov et al. 2023 (arXiv 2305.18290, eq.
    20). For two completions it is DPO.
    """
    rewards, grades = _tables(groups, beta)
    worse = (grades[:, None, :] < grades[:, :, None]) & (grades > NONE)[:, None, :]
    itself = torch.eye(grades.shape[1], dtype=torch.bool, device=grades.device)
    compared = torch.where(worse | itself, rewards[:, None, :], NONE)
    terms = torch.logsumexp(compared, 2) - rewards
    return torch.where(grades > NONE, terms, 0.0).sum(1)


def lipo_loss(groups: GroupLogps, *, beta: float) -> Tensor:
    r"""Return the LiPO-λ loss of each list, `[B]`.

    :math:`\sum_{\psi_i > \psi_j} \Delta_{ij}\log(1 + e^{-(s_i - s_j)})` with :math:`s = \beta r`
    and the weights of LambdaRank,
    :math:`\Delta_{ij} = |2^{\psi_i} - 2^{\psi_j}| \cdot |1/\log_2(1+\tau_i) - 1/\log_2(1+\tau_j)|`,
    where :math:`\tau` is the rank by :math:`s`, Liu et al. 2024 (arXiv 2402.01878, eq. 9 and 10).
    The paper's labels :math:`\psi` are in [0, 1]: grades are scaled to this range in each list.
    Equal :math:`s`, such as those at policy = reference, are ranked by their grades: with equal
    ranks, the weights and the gradient would be 0 there. The weights have no gradient.
    """
    rewards, grades = _tables(groups, beta)
    is_there = grades > NONE
    gains = torch.exp2(_unit(grades, is_there))
    ranks = _ranks(torch.where(is_there, rewards, NONE), grades)
    discounts = 1 / torch.log2(2 + ranks.double())
    weights = _differences(gains).abs() * _differences(discounts).abs()
    better = (grades[:, :, None] > grades[:, None, :]) & is_there[:, None, :]
    return torch.where(better, -weights * logsigmoid(_differences(rewards)), 0.0).sum((1, 2))


def _ranks(rewards: Tensor, grades: Tensor) -> Tensor:
    """Return the ranks of rewards from 0, the highest first, int64 `[B, K]`; ties by grades."""
    by_grade = grades.argsort(dim=1, descending=True, stable=True)
    by_reward = rewards.gather(1, by_grade).argsort(dim=1, descending=True, stable=True)
    return by_grade.gather(1, by_reward).argsort(1)


def _unit(grades: Tensor, is_there: Tensor) -> Tensor:
    """Scale the grades of each list to [0, 1]; 0 where there is none."""
    low = torch.where(is_there, grades, torch.inf).amin(1, keepdim=True)
    span = grades.amax(1, keepdim=True) - low
    return torch.where(is_there, (grades - low) / span.clamp(min=1e-300), 0.0)


def softmax_dpo_loss(groups: GroupLogps, *, beta: float) -> Tensor:
    r"""Return the softmax DPO loss of each list, `[B]`: one chosen, several rejected.

    :math:`-\log\sigma(-\log\sum_l e^{\beta(r_l - r_w)})`, Chen et al. 2024 (arXiv 2406.09215, eq.
    9), where the best completion is chosen and all worse ones are rejected; the mean over the best
    ones if several are equal. For two completions it is DPO.
    """
    rewards, grades = _tables(groups, beta)
    best = grades == grades.amax(1, keepdim=True)
    rest = torch.where((grades > NONE) & ~best, rewards, NONE).logsumexp(1, keepdim=True)
    losses = torch.where(best, -logsigmoid(rewards - rest), 0.0)
    return losses.sum(1) / best.sum(1)


def best_worst_loss(groups: GroupLogps, *, beta: float) -> Tensor:
    r"""Return DPO's loss of the best against the worst completion of each list, `[B]`.

    If several are equally good or bad, the first of them in the data is used.
    """
    rewards, grades = _tables(groups, beta)
    best = grades.argmax(1, keepdim=True)
    worst = torch.where(grades > NONE, grades, torch.inf).argmin(1, keepdim=True)
    return -logsigmoid(rewards.gather(1, best) - rewards.gather(1, worst))[:, 0]


def _tables(groups: GroupLogps, beta: float) -> tuple[Tensor, Tensor]:
    """Return the rewards β·r and the grades of each list, `[B, K]`; 0 and -inf where is none."""
    return groups.table(beta * groups.logratios, 0.0), groups.grade_table()


def _differences(values: Tensor) -> Tensor:
    """Return value i minus value j of each list, `[B, K, K]`."""
    return values[:, :, None] - values[:, None, :]


def concordance(rewards: Tensor, grades: Tensor) -> Tensor:
    """Return the share of a list's comparisons that rewards order as grades do, `[B]`.

    Args:
        rewards: `[B, K]`.
        grades: `[B, K]`, -inf where there is no completion.

    Returns:
        Shares; equal rewards count half. NaN for a list without any comparison.
    """
    better = (grades[:, :, None] > grades[:, None, :]) & (grades > NONE)[:, None, :]
    right = (torch.sign(_differences(rewards)) + 1) / 2
    return torch.where(better, right, 0.0).sum((1, 2)) / better.sum((1, 2))
