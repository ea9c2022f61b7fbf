"""Numbers of a whole update: what they count, and what a run remembers from update to update."""

import json
from collections.abc import Sequence
from math import exp

import numpy as np
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
    options = {"keep": 1.0} if name == "beta-dpo" else {}  # its draw is by the order of the data
    expected = losses(objective_of(name, **options), update)
    found = losses(objective_of(name, **options), [update[i] for i in order])
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
    objective = objective_of("beta-dpo", alpha=0.4, momentum=0.75, keep=1.0)
    factors = []
    for gap in (1.0, 3.0, 2.0):
        groups = groups_of(
            pair(Answer(gap + 5 - 20, -20.0), Answer(-20.0, -20.0)),
            pair(Answer(gap - 5 - 20, -20.0), Answer(-20.0, -20.0)),
        )
        factors.append(objective.statistics(groups.on_host(), trains=True)["scale"].item())
    assert factors == pytest.approx([1, 1 + 0.4 * (3 - 1), 1 + 0.4 * (2 - 1.5)], rel=1e-12)
    assert objective.memory["beta-dpo"]["mean"] == pytest.approx(1.625, rel=1e-12)


def test_the_filter_of_beta_dpo_draws_pairs_by_the_normal_density_of_their_margins() -> None:
    """Of margins 0, 0.1 and 9 around M = 0 with σ = 1, the last is hardly ever among two."""
    objective = objective_of("beta-dpo", keep=2 / 3)
    objective.memory["beta-dpo"] |= {"mean": 0.0, "spread": 1.0}
    kept = np.zeros(3)
    for update in range(300):
        objective.memory["beta-dpo"] |= {"mean": 0.0, "spread": 1.0, "updates": float(update)}
        groups = groups_of(*(pair(Answer(d, 0.0), Answer(0.0, 0.0)) for d in (0.0, 0.1, 9.0)))
        share = objective.statistics(groups.on_host(), trains=True)["share"].view(3, 2)
        assert torch.equal(share[:, 0], share[:, 1])
        assert sorted(share[:, 0].tolist()) == [0.0, 1.5, 1.5]
        kept += share[:, 0].numpy() > 0
    assert kept.tolist() == [300, 300, 0]
    near = np.zeros(3)
    for update in range(2000):
        objective.memory["beta-dpo"] |= {"mean": 0.0, "spread": 1.0, "updates": float(update)}
        groups = groups_of(*(pair(Answer(d, 0.0), Answer(0.0, 0.0)) for d in (0.0, 1.0, 2.0)))
        share = objective.statistics(groups.on_host(), trains=True)["share"].view(3, 2)
        near += share[:, 0].numpy() > 0
    # Drawn one after the other, in proportion to 1, e^-0.5 and e^-2.
    p, q, r = 1.0, exp(-0.5), exp(-2.0)
    both = [
        (a / (p + q + r)) * (b / (p + q + r - a)) + (b / (p + q + r)) * (a / (p + q + r - b))
        for a, b in ((p, q), (p, r), (q, r))
    ]
    expected = [both[0] + both[1], both[0] + both[2], both[1] + both[2]]
    assert (near / 2000).tolist() == pytest.approx(expected, abs=0.03)


def test_beta_dpo_keeps_all_pairs_where_none_is_nearer_and_in_evaluations() -> None:
    objective = objective_of("beta-dpo", keep=0.5)
    equal = groups_of(*[pair(Answer(-3.0, -3.0), Answer(-5.0, -5.0))] * 6).on_host()
    assert objective.statistics(equal, trains=True)["share"].tolist() == [1.0] * 12
    other = [pair(Answer(d, 0.0), Answer(0.0, 0.0)) for d in (0.0, 1.0, 2.0, 5.0)]
    groups = groups_of(*other).on_host()
    assert objective.statistics(groups, trains=False)["share"].tolist() == [1.0] * 8
    found = objective.statistics(groups, trains=True)["share"]
    assert sorted(found.tolist()) == [0.0] * 4 + [2.0] * 4


def test_the_pairs_that_beta_dpo_keeps_do_not_depend_on_earlier_calls() -> None:
    """A resumed run has the memory of a checkpoint, and draws what the run would have drawn."""
    groups = groups_of(*(pair(Answer(d, 0.0), Answer(0.0, 0.0)) for d in (0.0, 1.0, 2.0, 5.0)))
    one, other = objective_of("beta-dpo"), objective_of("beta-dpo")
    for _ in range(3):
        one.statistics(groups.on_host(), trains=True)
    other.memory["beta-dpo"] |= one.memory["beta-dpo"]
    first, second = (each.statistics(groups.on_host(), trains=True) for each in (one, other))
    assert torch.equal(first["share"], second["share"])
    assert one.memory == other.memory


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
