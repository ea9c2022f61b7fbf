"""Numbers of a whole update: what they count, and what a run remembers from update to update."""

import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import Answer, bad, good, groups_of, objective_of, pair, with_statistics

from logratio.training.methods.objective import Objective
from logratio.training.methods.table import METHODS

OF_UPDATE = [name for name, method in METHODS.items() if method.statistics]
NUMBERS = st.floats(-50, -1)


def update_of(name: str, policy: Sequence[float]) -> list[list[Answer]]:
    """Return an update whose reference log-probs are -10 to -19, in turn."""
    answers = [Answer(one, -10.0 - i % 10, 1 + i % 3) for i, one in enumerate(policy)]
    sides = list(zip(answers[0::2], answers[1::2], strict=True))
    if METHODS[name].data == "labelled answers":
        return [(good, bad)[i % 2](one, other) for i, (one, other) in enumerate(sides)]
    return [pair(chosen, rejected) for chosen, rejected in sides]


def losses(objective: Objective, update: Sequence[Sequence[Answer]]) -> list[float]:
    found: list[float] = objective.losses(with_statistics(objective, groups_of(*update))).tolist()
    return found


policies = st.lists(NUMBERS, min_size=8, max_size=8, unique=True)


@pytest.mark.parametrize("name", OF_UPDATE)
@settings(max_examples=10)
@given(first=policies, second=policies)
def test_a_run_that_continues_has_the_losses_of_one_that_was_not_interrupted(
    name: str, first: list[float], second: list[float]
) -> None:
    """A checkpoint contains the memory as JSON."""
    whole = objective_of(name)
    losses(whole, update_of(name, first))
    resumed = objective_of(name)
    resumed.memory = json.loads(json.dumps(whole.memory))
    update = update_of(name, second)
    assert losses(whole, update) == losses(resumed, update)


@pytest.mark.parametrize("name", OF_UPDATE)
def test_an_evaluation_leaves_the_memory_as_it_is(name: str) -> None:
    objective = objective_of(name)
    losses(objective, update_of(name, [-9.0, -12.0, -11.5, -8.0]))
    before = json.dumps(objective.memory)
    update = groups_of(*update_of(name, [-3.0, -30.0, -2.0, -1.0]))
    objective.statistics(update, trains=False)
    assert json.dumps(objective.memory) == before


@pytest.mark.parametrize("name", OF_UPDATE)
@settings(max_examples=10)
@given(policy=policies, order=st.permutations(range(4)))
def test_the_order_of_groups_in_an_update_changes_no_loss(
    name: str, policy: list[float], order: list[int]
) -> None:
    update = update_of(name, policy)
    expected = losses(objective_of(name), update)
    found = losses(objective_of(name), [update[i] for i in order])
    assert found == pytest.approx([expected[i] for i in order], rel=1e-12)


@pytest.mark.parametrize("name", OF_UPDATE)
def test_statistics_are_numbers_of_the_update_or_of_its_completions(name: str) -> None:
    groups = groups_of(*update_of(name, [-9.0, -12.0, -11.5, -8.0])).on_host()
    for value in objective_of(name).statistics(groups, trains=True).values():
        assert value.dtype == torch.float64
        assert value.shape in {(), (4,)}


def test_the_mean_reward_of_bco_is_that_of_all_completions_so_far() -> None:
    """Not the mean of the means of updates, which have different sizes."""
    objective = objective_of("bco", 0.5)
    sizes, rewards = (1, 4, 2), []
    for number, size in enumerate(sizes):
        made = [pair(Answer(-1.0 - number - i, -3.0), Answer(-4.0 * i, -5.0)) for i in range(size)]
        rewards += [0.5 * one.logratio for both in made for one in both]
        found = objective.statistics(groups_of(*made).on_host(), trains=True)
        assert found["shift"].item() == pytest.approx(sum(rewards) / len(rewards), rel=1e-12)
    assert objective.memory["bco"]["count"] == len(rewards) == 14


def test_the_reference_point_of_kto_counts_mismatched_completions_only() -> None:
    update = [good(Answer(-1.0, -9.0), Answer(-2.0, -3.0)), bad(Answer(-9.0, -1.0))]
    found = objective_of("kto").statistics(groups_of(*update).on_host(), trains=True)
    assert found["reference_point"].item() == 1.0


def test_the_factor_of_beta_dpo_follows_the_moving_average() -> None:
    """Means of D 1, 3, 2 with a momentum of 0.75: M is 1, 1, 1.5; then 1.625."""
    objective = objective_of("beta-dpo", alpha=0.4, momentum=0.75)
    factors = []
    for gap in (1.0, 3.0, 2.0):
        groups = groups_of(
            pair(Answer(gap + 5 - 20, -20.0), Answer(-20.0, -20.0)),
            pair(Answer(gap - 5 - 20, -20.0), Answer(-20.0, -20.0)),
        )
        factors.append(objective.statistics(groups.on_host(), trains=True)["scale"].item())
    assert factors == pytest.approx([1, 1 + 0.4 * (3 - 1), 1 + 0.4 * (2 - 1.5)], rel=1e-12)
    assert objective.memory["beta-dpo"]["mean"] == pytest.approx(1.625, rel=1e-12)


@settings(max_examples=20)
@given(policy=policies)
def test_optimal_transport_matches_each_rank_once(policy: list[float]) -> None:
    update = update_of("aot", policy)
    groups = groups_of(*update).on_host()
    quantiles = objective_of("aot").statistics(groups, trains=True)["quantile"].tolist()
    references = [c.reference - r.reference for c, r in update]
    assert quantiles[0::2] == quantiles[1::2]
    assert sorted(quantiles[0::2]) == sorted(references)
    partners = objective_of("aot-unpaired").statistics(groups, trains=True)["partner"].tolist()
    assert sorted(partners[0::2]) == sorted(r.logratio for _, r in update)
    assert sorted(partners[1::2]) == sorted(c.logratio for c, _ in update)


def test_the_loss_of_optimal_transport_is_that_of_sorted_values() -> None:
    """As TRL has it: the mean over sorted values, whatever their groups."""
    update = update_of("aot", [-9.0, -12.0, -11.5, -8.0, -17.0, -12.5, -3.0, -21.0])
    own = torch.tensor([c.policy - r.policy for c, r in update], dtype=torch.float64)
    fixed = torch.tensor([c.reference - r.reference for c, r in update], dtype=torch.float64)
    expected = torch.log1p(torch.exp(-0.1 * (own.sort().values - fixed.sort().values)))
    found = losses(objective_of("aot"), update)
    assert sum(found) == pytest.approx(expected.sum().item(), rel=1e-12)
