"""Losses against arithmetic written out by hand, their initial values, and autograd in fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logratio.training.losses import (
    PAIR_LOSSES,
    accuracies,
    gradient_weight,
    implicit_rewards,
    mean_rewards,
)
from torch import Tensor

from logratio.training import PairLogps, dpo_loss, ipo_loss, sft_loss, simpo_loss


def pairs(*numbers: float) -> PairLogps:
    a, b, c, d, e, f = (torch.tensor([number], dtype=torch.float64) for number in numbers)
    return PairLogps(a, b, c, d, e, f)


EXAMPLE = pairs(-10.0, -14.0, -11.0, -12.0, 5.0, 4.0)  # log-ratios: chosen 1, rejected -2
finite = st.floats(-500, 0)
length = st.integers(1, 500).map(float)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_by_hand() -> None:
    assert dpo_loss(EXAMPLE, beta=0.1).item() == pytest.approx(-math.log(sigmoid(0.1 * 3)))


def test_label_smoothing_by_hand() -> None:
    expected = -0.9 * math.log(sigmoid(0.3)) - 0.1 * math.log(sigmoid(-0.3))
    assert dpo_loss(EXAMPLE, beta=0.1, label_smoothing=0.1).item() == pytest.approx(expected)


def test_ipo_by_hand() -> None:
    expected = (1 / 5 - (-2) / 4 - 1 / (2 * 0.25)) ** 2
    assert ipo_loss(EXAMPLE, beta=0.25).item() == pytest.approx(expected)


def test_simpo_by_hand() -> None:
    expected = -math.log(sigmoid(2.0 * (-10 / 5 - -14 / 4) - 0.7))
    assert simpo_loss(EXAMPLE, beta=2.0, gamma=0.7).item() == pytest.approx(expected)


def test_sft_by_hand() -> None:
    assert sft_loss(torch.tensor([-6.0]), torch.tensor([3.0])).item() == 2.0


def test_gradient_weight_by_hand() -> None:
    assert gradient_weight(*implicit_rewards(EXAMPLE, 0.1)).item() == pytest.approx(sigmoid(-0.3))


@given(finite, finite, length, length, st.floats(0.01, 5))
def test_initial_values(chosen: float, rejected: float, n: float, m: float, beta: float) -> None:
    at_reference = pairs(chosen, rejected, chosen, rejected, n, m)
    for loss in PAIR_LOSSES.values():
        if loss.initial_value is not None:
            value = loss.function(at_reference, beta=beta).item()
            assert value == pytest.approx(loss.initial_value(beta), rel=1e-9)


def test_known_initial_values() -> None:
    values = {
        name: loss.initial_value(0.1)
        for name, loss in PAIR_LOSSES.items()
        if loss.initial_value is not None
    }
    assert values == {"dpo": pytest.approx(0.693147, abs=1e-6), "ipo": pytest.approx(25.0)}


@settings(deadline=None)
@given(st.tuples(finite, finite, finite, finite, length, length))
def test_gradients_are_those_of_the_formula(numbers: tuple[float, ...]) -> None:
    example = pairs(*numbers)
    example.policy_chosen_logps.requires_grad_(True)
    example.policy_rejected_logps.requires_grad_(True)
    dpo_loss(example, beta=0.1).sum().backward()
    weight = gradient_weight(*implicit_rewards(example, 0.1)).item()
    chosen, rejected = example.policy_chosen_logps.grad, example.policy_rejected_logps.grad
    assert isinstance(chosen, Tensor)
    assert isinstance(rejected, Tensor)
    assert chosen.item() == pytest.approx(-0.1 * weight, abs=1e-12)
    assert rejected.item() == pytest.approx(0.1 * weight, abs=1e-12)


def test_extreme_margins_stay_finite() -> None:
    for sign in (1, -1):
        example = pairs(sign * 1e4, -sign * 1e4, 0.0, 0.0, 1.0, 1.0)
        assert torch.isfinite(dpo_loss(example, beta=1.0)).all()


def test_a_tie_counts_half() -> None:
    left, right = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    assert accuracies(left, right).tolist() == [1.0, 0.5, 0.0]


def test_simpo_reports_the_rewards_of_its_own_margin() -> None:
    """A long chosen completion has a lower sum and yet wins per token."""
    example = pairs(-200.0, -40.0, 0.0, 0.0, 200.0, 20.0)
    chosen, rejected = mean_rewards(example, 2.0)
    assert (chosen.item(), rejected.item()) == (-2.0, -4.0)
    assert PAIR_LOSSES["simpo"].rewards is mean_rewards
    expected = -math.log(sigmoid((chosen - rejected).item() - 1.0))
    assert simpo_loss(example, beta=2.0, gamma=1.0).item() == pytest.approx(expected)
