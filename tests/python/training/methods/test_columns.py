"""Metrics of groups, by hand."""

from math import exp

import pytest
import torch
from loss_inputs import Answer, groups_of, objective_of, pair

from logratio.training.methods.columns import accuracies, gradient_weight
from logratio.training.methods.lists import concordance

EXAMPLE = groups_of(pair(Answer(-10.0, -11.0, 5), Answer(-14.0, -12.0, 4)))


def test_gradient_weight_by_hand() -> None:
    (term,) = objective_of("dpo").terms
    chosen, rejected = term.rewards(EXAMPLE)
    assert gradient_weight(chosen, rejected).item() == pytest.approx(1 / (1 + exp(0.3)))


def test_the_gradient_weight_is_that_of_dpos_gradient() -> None:
    policy = EXAMPLE.policy_logps.clone().requires_grad_()
    moved = groups_of(pair(Answer(-10.0, -11.0, 5), Answer(-14.0, -12.0, 4)))
    object.__setattr__(moved, "policy_logps", policy)
    objective = objective_of("dpo", 0.1)
    objective.losses(moved).sum().backward()
    weight = gradient_weight(*objective.terms[0].rewards(EXAMPLE)).item()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.1 * weight, 0.1 * weight], rel=1e-12)


def test_a_tie_counts_half() -> None:
    left, right = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    assert accuracies(left, right).tolist() == [1.0, 0.5, 0.0]


def test_simpo_reports_the_rewards_of_its_own_margin() -> None:
    """A long chosen completion has a lower sum and yet wins per token."""
    long = groups_of(pair(Answer(-200.0, 0.0, 200), Answer(-40.0, 0.0, 20)))
    (term,) = objective_of("simpo").terms
    assert term.rewards(long).tolist() == [-2.0, -4.0]
    assert term.losses(long).item() == pytest.approx(-torch.tensor(1.0).sigmoid().log().item())


def test_concordance_counts_the_comparisons_of_the_data() -> None:
    """Of three comparisons, one is right and one is a tie; empty places are not compared."""
    rewards = torch.tensor([[1.0, 1.0, 2.0], [0.0, 1.0, 0.0]])
    grades = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, -torch.inf]])
    assert concordance(rewards, grades).tolist() == pytest.approx([0.5 / 3, 1.0])
