"""Metrics of groups, by the kind of their data, and their means over an update."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from logratio.training.methods.lists import concordance
from logratio.training.methods.logps import GroupLogps


class Weighted(NamedTuple):
    """A metric that not every group has: values and their weights in the mean, `[n]` each."""

    values: Tensor
    weights: Tensor


Columns = dict[str, Tensor | Weighted]
"""Metrics by name: one value per group, float64 `[B]`, or weighted values."""


def gradient_weight(chosen: Tensor, rejected: Tensor) -> Tensor:
    r"""Return :math:`\sigma(\hat r_l - \hat r_w)` of two rewards, `[B]`.

    This is DPO's weight of a pair's gradient: 1/2 at the start, near 0 when the pair is learned.
    """
    return torch.sigmoid(rejected - chosen)


def accuracies(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where chosen is above rejected, 0.5 where they are equal, else 0: `[B]`."""
    return (torch.sign(chosen - rejected) + 1) / 2


def pair_columns(losses: Tensor, groups: GroupLogps, rewards: Tensor) -> Columns:
    """Return the metrics of pairs; rewards are those of each completion, `[N]`.

    A tie counts half towards the accuracy, so it is 0.5 at the start, when every margin is 0.
    Log-ratios are omitted without a reference.
    """
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    pairs = groups.pairs()
    columns: Columns = {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": accuracies(chosen, rejected),
        "logps/chosen": pairs.policy_chosen_logps,
        "logps/rejected": pairs.policy_rejected_logps,
        "lengths/chosen": pairs.chosen_lengths,
        "lengths/rejected": pairs.rejected_lengths,
        "gradient_weight": gradient_weight(chosen, rejected),
    }
    if groups.has_reference:
        columns["logratios/chosen"] = pairs.chosen_logratios
        columns["logratios/rejected"] = pairs.rejected_logratios
    return columns


def list_columns(losses: Tensor, groups: GroupLogps, rewards: Tensor) -> Columns:
    """Return the metrics of lists, under the names of pairs.

    "chosen" is the best completion, "rejected" the mean of the worse ones, and the accuracy is the
    share of all comparisons in the data that the rewards order in the same way.
    """
    grades, table = groups.grade_table(), groups.table(rewards, 0.0)
    best = (grades == grades.amax(1, keepdim=True)).double()
    rest = (grades > -torch.inf).double() - best
    columns: Columns = {"loss": losses}
    for name, values in (
        ("rewards", table),
        ("logps", groups.table(groups.policy_logps, 0.0)),
        ("lengths", groups.table(groups.lengths, 0.0)),
        ("logratios", groups.table(groups.logratios, 0.0)),
    ):
        if name == "logratios" and not groups.has_reference:
            continue
        columns[f"{name}/chosen"] = (values * best).sum(1) / best.sum(1)
        columns[f"{name}/rejected"] = (values * rest).sum(1) / rest.sum(1)
        if name == "rewards":
            columns["rewards/margins"] = columns["rewards/chosen"] - columns["rewards/rejected"]  # type: ignore[operator]
            columns["rewards/accuracies"] = concordance(table, grades)
    return columns


def answer_columns(losses: Tensor, groups: GroupLogps, rewards: Tensor) -> Columns:
    """Return the metrics of single answers: means over the good and over the bad ones.

    "logratios/mismatched" estimates the KL divergence in KTO: the mean log-ratio of answers to
    other prompts, if there are any in the data.
    """
    good, bad = groups.is_chosen, groups.is_rejected
    columns: Columns = {"loss": losses}
    for name, values in (
        ("rewards", rewards),
        ("logps", groups.policy_logps),
        ("lengths", groups.lengths),
        ("logratios", groups.logratios),
    ):
        columns[f"{name}/chosen"] = Weighted(values, good)
        columns[f"{name}/rejected"] = Weighted(values, bad)
    columns["logratios/mismatched"] = Weighted(groups.logratios, groups.is_mismatched)
    return columns


def demonstration_columns(losses: Tensor, groups: GroupLogps, rewards: Tensor) -> Columns:
    """Return the metrics of demonstrations."""
    return {
        "loss": losses,
        "logps/chosen": groups.policy_logps,
        "lengths/chosen": groups.lengths,
    }


def averages(
    columns: Mapping[str, Tensor | Weighted],
    total: Callable[[Tensor], Tensor] = lambda values: values,
    **scalars: Tensor,
) -> tuple[dict[str, float], int]:
    """Average columns, and copy the means and `scalars` to the host in one transfer.

    Args:
        columns: The metrics of each group.
        total: Sums values over all processes of a run.
        **scalars: Metrics of the whole update, equal in all processes.

    Returns:
        The values by name, and the number of groups. A metric that no group has is left out. The
        margin of rewards with weights is the difference of their means.
    """
    plain = {name: column for name, column in columns.items() if isinstance(column, Tensor)}
    other = {name: column for name, column in columns.items() if isinstance(column, Weighted)}
    stacked = torch.stack([*plain.values()])
    sums = stacked.sum(1, dtype=torch.float64)
    parts = [sums, sums.new_full((1,), stacked.shape[1])]
    parts += [_weighted_sums(column) for column in other.values()]
    sums = total(torch.cat(parts))
    alone = [scalar.to(torch.float64).view(1) for scalar in scalars.values()]
    *found, count = torch.cat([sums[len(plain) + 1 :], *alone, sums[: len(plain) + 1]]).tolist()
    rest, end = found[: 2 * len(other)], len(found) - len(plain)
    means = {
        name: value / count if count else value
        for name, value in zip(plain, found[end:], strict=True)
    }
    for name, mass, weight in zip(other, rest[::2], rest[1::2], strict=True):
        means |= {name: mass / weight} if weight else {}
    if other and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means | dict(zip(scalars, found[2 * len(other) : end], strict=True)), int(count)


def _weighted_sums(column: Weighted) -> Tensor:
    """Return the sum of weighted values and that of the weights, float64 `[2]`."""
    values = torch.stack([column.values * column.weights, column.weights])
    return values.sum(1, dtype=torch.float64)
