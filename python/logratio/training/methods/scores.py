"""Losses of reward models, whose inputs are scores of a scalar head instead of log-probs."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from logratio.training.methods.logps import PairLogps


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
