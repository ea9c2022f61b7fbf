"""Preference losses as pure functions of log-probs, and the objective of a run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from logratio.training.config import TrainConfig


@dataclass(frozen=True)
class PairLogps:
    """Inputs of a pair loss, one element per pair.

    Attributes:
        policy_chosen_logps, policy_rejected_logps: Summed log-probs under the policy, in nats,
            float64 `[B]`.
        reference_chosen_logps, reference_rejected_logps: The same under the reference; zeros for
            a loss without a reference.
        chosen_lengths, rejected_lengths: Numbers of counted tokens, `[B]`.
        has_reference: Whether the reference's log-probs are meaningful.
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
        """Log-ratio of the chosen completion, policy minus reference: `[B]`, in nats."""
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """Log-ratio of the rejected completion, policy minus reference: `[B]`, in nats."""
        return self.policy_rejected_logps - self.reference_rejected_logps


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
    margins = beta * (pairs.chosen_logratios - pairs.rejected_logratios)
    kept, flipped = logsigmoid(margins), logsigmoid(-margins)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


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


def simpo_loss(
    pairs: PairLogps, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    r"""Return the SimPO loss of each pair, `[B]`; it uses no reference.

    :math:`-\log\sigma(\beta(l_w/n_w - l_l/n_l) - \gamma)`, Meng et al. 2024 (arXiv 2405.14734,
    eq. 6), with label smoothing as in `dpo_loss`. Its initial value depends on the data.

    Args:
        pairs: The policy's log-probs and lengths of the pairs.
        beta: Scale of the rewards, :math:`\beta`.
        gamma: Target margin, :math:`\gamma`.
        label_smoothing: Share of flipped labels, in [0, 0.5).
    """
    chosen = pairs.policy_chosen_logps / pairs.chosen_lengths
    rejected = pairs.policy_rejected_logps / pairs.rejected_lengths
    margins = beta * (chosen - rejected) - gamma
    kept, flipped = logsigmoid(margins), logsigmoid(-margins)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def sft_loss(policy_logps: Tensor, lengths: Tensor) -> Tensor:
    """Return the negative mean log-prob per token of each demonstration, `[N]`.

    Args:
        policy_logps: Summed log-probs, in nats, `[N]`.
        lengths: Numbers of counted tokens, `[N]`.
    """
    return -policy_logps / lengths


PairRewards = tuple[Tensor, Tensor]
"""Rewards of the chosen and the rejected completions, `[B]` each."""


def implicit_rewards(pairs: PairLogps, beta: float) -> PairRewards:
    """Return β × log-ratio of each completion: the reward that is exported and served."""
    return beta * pairs.chosen_logratios, beta * pairs.rejected_logratios


def mean_rewards(pairs: PairLogps, beta: float) -> PairRewards:
    """Return β × mean log-prob per token: SimPO's rewards (eq. 4)."""
    chosen = pairs.policy_chosen_logps / pairs.chosen_lengths
    return beta * chosen, beta * pairs.policy_rejected_logps / pairs.rejected_lengths


def gradient_weight(chosen: Tensor, rejected: Tensor) -> Tensor:
    r"""Return :math:`\sigma(\hat r_l - \hat r_w)` of two rewards, `[B]`.

    This is DPO's weight of a pair's gradient: 1/2 at the start, near 0 when the pair is learned.
    """
    return torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class PairLoss:
    """A pair loss with its properties.

    Attributes:
        function: The loss function.
        default_beta: Default β; β is not comparable across losses.
        options: Keyword arguments of `function` other than `beta`.
        needs_reference: False for a loss without reference log-probs.
        initial_value: Value at policy = reference, as a function of β; None if it is not fixed.
        rewards: The rewards whose margin the loss increases, reported in the metrics.
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


class Objective(Protocol):
    """The loss of a run and its metrics, as functions of summed log-probs, float64 `[N]`.

    Losses are computed for each part of a micro-batch, while the GPU waits. Metrics are therefore
    computed separately, once per update for all of its groups.
    """

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        """Return the loss of each group, `[B]`, from log-prob sums and token counts, `[N]`."""
        ...

    def columns(
        self, losses: Tensor, policy: Tensor, reference: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        """Return the metrics of each group by name, `[B]` each; the trainer averages them."""
        ...


def make_objective(config: TrainConfig, beta: float) -> Objective:
    """Return the objective of the loss `config.loss`."""
    return _Demonstrations() if config.loss == "sft" else _Preferences(config, beta)


class _Demonstrations:
    """Groups of one completion, without a reference."""

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        return sft_loss(policy, lengths)

    def columns(
        self, losses: Tensor, policy: Tensor, reference: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        return demonstration_columns(losses, policy, lengths)


class _Preferences:
    """Groups of two completions: chosen, then rejected (see `check_groups`)."""

    def __init__(self, config: TrainConfig, beta: float) -> None:
        self._loss, self._beta = PAIR_LOSSES[config.loss], beta
        self._options: dict[str, Any] = {n: getattr(config, n) for n in self._loss.options}

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
        pairs = self._pairs(policy, reference, lengths)
        return self._loss.function(pairs, beta=self._beta, **self._options)

    def columns(
        self, losses: Tensor, policy: Tensor, reference: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        pairs = self._pairs(policy, reference, lengths)
        return pair_columns(losses, pairs, self._loss.rewards(pairs, self._beta))

    def _pairs(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> PairLogps:
        """Split chosen from rejected by position; a mask would make the host wait for its size."""
        policies, references, counts = map(_sides, (policy, reference, lengths))
        return PairLogps(*policies, *references, *counts, self._loss.needs_reference)


def _sides(column: Tensor) -> tuple[Tensor, Tensor]:
    """Split a column `[N]` into its chosen and its rejected completions, `[B]` each."""
    chosen, rejected = column.view(-1, 2).unbind(1)
    return chosen, rejected


def pair_columns(losses: Tensor, pairs: PairLogps, rewards: PairRewards) -> dict[str, Tensor]:
    """Return the metrics of each pair by name, float64 `[B]`, on the device of `losses`.

    A tie counts half towards the accuracy, so it is 0.5 at the start, when every margin is 0.
    Log-ratios are omitted without a reference.
    """
    chosen, rejected = rewards
    columns = {
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
    if pairs.has_reference:
        columns["logratios/chosen"] = pairs.chosen_logratios
        columns["logratios/rejected"] = pairs.rejected_logratios
    return columns


def accuracies(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 where chosen is above rejected, 0.5 where they are equal, else 0: `[B]`."""
    return (torch.sign(chosen - rejected) + 1) / 2


def demonstration_columns(losses: Tensor, logps: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Return the metrics of each demonstration by name, float64 `[B]`."""
    return {"loss": losses, "logps/chosen": logps, "lengths/chosen": lengths}


def averages(
    columns: dict[str, Tensor],
    total: Callable[[Tensor], Tensor] = lambda values: values,
    **scalars: Tensor,
) -> tuple[dict[str, float], int]:
    """Average columns, `[B]` each, and copy the means and `scalars` to the host in one transfer.

    Args:
        columns: The metrics of each group.
        total: Sums values over all processes of a run.
        **scalars: Metrics of the whole update, equal in all processes.

    Returns:
        The values by name, and the number of groups.
    """
    stacked = torch.stack([*columns.values()])
    sums = stacked.sum(1, dtype=torch.float64)
    sums = total(torch.cat([sums, sums.new_full((1,), stacked.shape[1])]))
    alone = [scalar.to(torch.float64).view(1) for scalar in scalars.values()]
    values = torch.cat([sums[:-1] / sums[-1], *alone, sums[-1:]])
    *found, count = values.tolist()  # the only point where the host waits
    return dict(zip([*columns, *scalars], found, strict=True)), int(count)
