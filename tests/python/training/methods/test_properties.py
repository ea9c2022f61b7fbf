"""What holds for every loss: initial values, gradients, finite values, and equal losses."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import exp

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import (
    Answer,
    bad,
    good,
    groups_of,
    losses_of,
    methods_of,
    objective_of,
    pair,
    with_statistics,
)
from torch import Tensor

from logratio.training.methods.logps import GroupLogps
from logratio.training.methods.method import DataKind
from logratio.training.methods.objective import Objective
from logratio.training.methods.table import METHODS

LIST_METHODS = methods_of("lists")
log_probs = st.floats(-500.0, -0.01)
betas = st.floats(1e-3, 10.0)


def update_of(kind: DataKind, answers: Sequence[Answer]) -> GroupLogps:
    """Return an update with the given answers: pairs, labelled answers, a list, demonstrations."""
    if kind == "pairs":
        sides = zip(answers[0::2], answers[1::2], strict=True)
        return groups_of(*(pair(c, r, margin=2.0) for c, r in sides))
    if kind == "labelled answers":
        labels = (good, bad)
        sides = zip(answers[0::2], answers[1::2], strict=True)
        return groups_of(*(labels[i % 2](one, other) for i, (one, other) in enumerate(sides)))
    if kind == "lists":
        return groups_of(answers[:2], answers)
    return groups_of(*([one] for one in answers))


def at_reference(name: str, policy: Sequence[float], lengths: Sequence[int]) -> GroupLogps:
    """Return an update in which the policy's log-probs are the reference's."""
    answers = [Answer(one, one, length) for one, length in zip(policy, lengths, strict=True)]
    return update_of(METHODS[name].data, answers)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.initial])
@settings(max_examples=15)
@given(
    policy=st.lists(log_probs, min_size=6, max_size=6),
    lengths=st.lists(st.integers(1, 5000), min_size=6, max_size=6),
    beta=betas,
)
def test_the_loss_at_policy_equal_to_reference_is_the_initial_value(
    name: str, policy: list[float], lengths: list[int], beta: float
) -> None:
    objective = objective_of(name, beta)
    losses = objective.losses(with_statistics(objective, at_reference(name, policy, lengths)))
    assert objective.initial_value is not None
    assert losses.tolist() == pytest.approx([objective.initial_value] * len(losses), rel=1e-12)


def test_initial_values_at_beta_0_1() -> None:
    """The values that TRL 1.16 gives for the losses it has, at β = 0.1 and ε = 0.1."""
    known = {
        "dpo": 0.693147, "cdpo": 0.693147, "hinge": 1.0, "ipo": 25.0, "exo": 0.510826,
        "nca": 1.386294, "robust": 0.693147, "bco": 1.386294, "sppo": 50.0, "aot": 0.693147,
        "aot-unpaired": 0.693147, "apo-zero": 1.0, "apo-down": 1.0, "discopop": 0.846574,
        "ln-dpo": 0.693147, "kto": 0.5, "apo-zero-unpaired": 0.5,
    }  # fmt: skip
    for name, value in known.items():
        smoothing = METHODS[name].options.get("label_smoothing")
        options = {"label_smoothing": 0.1} if smoothing else {}
        assert objective_of(name, 0.1, **options).initial_value == pytest.approx(value, abs=1e-6)


def test_kto_with_different_weights_has_no_initial_value() -> None:
    assert objective_of("kto", desirable_weight=2.0).initial_value is None
    assert objective_of("kto", desirable_weight=2.0, undesirable_weight=2.0).initial_value == 1.0


PLACES = [-9.3, -7.1, -12.6, -4.8, -6.2, -8.9]
REFERENCES = [-9.0, -8.4, -11.2, -5.1, -6.9, -8.1]
LENGTHS = [5, 4, 7, 2, 3, 6]


def differentiable(name: str) -> GroupLogps:
    """An update away from kinks and from equal values, whose log-probs have a gradient."""
    answers = [
        Answer(*one, confidence=0.2 - 0.3 * i, divergence=0.4 * i)
        for i, one in enumerate(zip(PLACES, REFERENCES, LENGTHS, strict=True))
    ]
    groups = update_of(METHODS[name].data, answers)
    return replace(groups, policy_logps=groups.policy_logps.requires_grad_())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "aot-unpaired"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_gradients_are_those_of_the_values(name: str, beta: float) -> None:
    """Numbers of the whole update have no gradient: they are constants here."""
    objective = objective_of(name, None if METHODS[name].beta is None else beta)
    groups = with_statistics(objective, differentiable(name))

    def losses(policy: Tensor) -> Tensor:
        return objective.losses(replace(groups, policy_logps=policy))

    assert torch.autograd.gradcheck(losses, (groups.policy_logps,), atol=1e-6)


@pytest.mark.parametrize("name", ["aot", "aot-unpaired"])
def test_gradients_of_optimal_transport_are_those_of_the_whole_update(name: str) -> None:
    """Partners in rank are computed anew for each value.

    In aot-unpaired they are log-ratios of the policy; their gradient is counted in their own group.
    """
    objective = objective_of(name)
    groups = differentiable(name)

    def total(policy: Tensor) -> Tensor:
        moved = replace(groups, policy_logps=policy)
        return objective.losses(with_statistics(objective, moved)).sum()

    (found,) = torch.autograd.grad(total(groups.policy_logps), groups.policy_logps)
    for i, slope in enumerate(found.tolist()):
        ahead, behind = (groups.policy_logps.detach().clone() for _ in range(2))
        ahead[i] += 1e-5
        behind[i] -= 1e-5
        assert slope == pytest.approx(float(total(ahead) - total(behind)) / 2e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "margin", "slopes"), [("tdpo1", 0.45, (-0.1, 0.1)), ("tdpo2", 0.375, (0.0, 0.05))]
)
def test_tdpo2_has_no_gradient_of_the_chosen_divergence(
    name: str, margin: float, slopes: tuple[float, float]
) -> None:
    """Of D = 3 and K = 2, 0.5, with β = 0.1, the margin is 0.1 (3 + 1.5) or 0.1 (3 + 1.5 / 2)."""
    groups = groups_of(pair(Answer(-10.0, -11.0), Answer(-14.0, -12.0)))
    divergences = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    losses = losses_of(name, replace(groups, divergences=divergences))
    (found,) = torch.autograd.grad(losses.sum(), divergences)
    weight = 1 / (1 + exp(margin))
    assert found.tolist() == pytest.approx([slope * weight for slope in slopes], rel=1e-12)


def extremes(name: str) -> list[GroupLogps]:
    """Log-ratios of ±10,000, lengths 1 and 5,000, equal completions, and sure ones."""
    far = [
        Answer(p, r, n, confidence=-p / 5000 - 3, divergence=1e4)
        for p, r in ((-1e4, 0.0), (0.0, -1e4))
        for n in (1, 5000)
    ]
    sure = Answer(0.0, 0.0, 1, confidence=0.0, divergence=0.0)
    equal = Answer(-3.0, -2.0, 5000, confidence=-1e4, divergence=0.0)
    kind = METHODS[name].data
    both = [side for sides in product(far, repeat=2) for side in sides]
    return [
        update_of(kind, answers) for answers in (both, [equal] * 4, [sure] * 4, [*far, sure, equal])
    ]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("beta", [1e-3, 0.1, 10.0])
def test_extreme_inputs_give_finite_losses_and_gradients(name: str, beta: float) -> None:
    objective = objective_of(name, None if METHODS[name].beta is None else beta)
    for groups in extremes(name):
        policy = groups.policy_logps.requires_grad_()
        losses = objective.losses(with_statistics(objective, groups))
        (slopes,) = torch.autograd.grad(losses.sum(), policy)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(slopes).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("discopop", {"tau": 50.0}),
        ("discopop", {"tau": 1e-3}),
        ("f-dpo-alpha", {"alpha": 1e-6}),
        ("f-dpo-alpha", {"alpha": 0.999}),
        ("alpha-po", {"alpha": 5.0}),
        ("chi-po", {"clip": 1e6}),
        ("exo", {"label_smoothing": 1e-9}),
        ("robust", {"label_smoothing": 0.499}),
        ("dpop", {"penalty": 1e4}),
        ("beta-dpo", {"alpha": 100.0}),
    ],
)
def test_extreme_options_give_finite_losses_and_gradients(
    name: str, options: dict[str, float]
) -> None:
    for beta in (1e-3, 10.0):
        objective = objective_of(name, beta, **options)
        for groups in extremes(name):
            policy = groups.policy_logps.requires_grad_()
            losses = objective.losses(with_statistics(objective, groups))
            (slopes,) = torch.autograd.grad(losses.sum(), policy)
            assert torch.isfinite(losses).all()
            assert torch.isfinite(slopes).all()


def test_a_sure_completion_still_has_orpos_likelihood_gradient() -> None:
    groups = groups_of(pair(Answer(0.0, 0.0, 4), Answer(-8.0, 0.0, 4)))
    policy = groups.policy_logps.requires_grad_()
    (slopes,) = torch.autograd.grad(losses_of("orpo", groups).sum(), policy)
    assert slopes[0] == -1 / 4


@pytest.mark.parametrize("name", ["f-dpo-forward-kl", "chi-po", "f-dpo-alpha", "alpha-po"])
def test_where_an_exponential_is_replaced_the_gradient_keeps_its_sign(name: str) -> None:
    """A clamp would leave a pair that is far on the wrong side without any gradient."""
    chosen, rejected = Answer(-9e3, -100.0, 1), Answer(-100.0, -9e3, 1)
    groups = groups_of(pair(chosen, rejected))
    policy = groups.policy_logps.requires_grad_()
    clip = {"clip": 1e18} if name == "chi-po" else {}
    (slopes,) = torch.autograd.grad(losses_of(name, groups, **clip).sum(), policy)
    assert slopes[0] < 0 <= slopes[1]


# Equal losses.


@st.composite
def random_pairs(draw: st.DrawFn) -> GroupLogps:
    numbers = st.tuples(log_probs, log_probs, st.integers(1, 50))
    made = [Answer(*draw(numbers)) for _ in range(2 * draw(st.integers(1, 4)))]
    return update_of("pairs", made)


def same(left: Tensor, right: Tensor, rel: float = 1e-9, abs: float = 1e-12) -> bool:
    return bool(left.tolist() == pytest.approx(right.tolist(), rel=rel, abs=abs))


@pytest.mark.parametrize("name", ["plackett-luce", "softmax-dpo", "best-worst", "step-dpo"])
@settings(max_examples=15)
@given(groups=random_pairs(), beta=betas)
def test_on_pairs_it_is_dpo(name: str, groups: GroupLogps, beta: float) -> None:
    assert same(losses_of(name, groups, beta), losses_of("dpo", groups, beta))


@settings(max_examples=15)
@given(groups=random_pairs(), beta=st.floats(1e-3, 1.0))
def test_limits_of_options(groups: GroupLogps, beta: float) -> None:
    dpo, simpo = losses_of("dpo", groups, beta), losses_of("simpo", groups, beta)
    # Second-order terms are of the order of alpha * (log-ratio)^2.
    assert same(losses_of("f-dpo-alpha", groups, beta, alpha=1e-12), dpo, 1e-5, 1e-5)
    assert same(losses_of("alpha-po", groups, beta, alpha=1e-12), simpo, 1e-5, 1e-5)
    assert same(losses_of("robust", groups, beta, label_smoothing=1e-12), dpo, 1e-8, 1e-8)
    assert same(losses_of("r-dpo", groups, beta, alpha=0.0), dpo)
    assert same(losses_of("dpop", groups, beta, penalty=0.0), dpo)
    assert same(losses_of("odpo", groups, beta, alpha=0.0), dpo)
    assert same(losses_of("beta-dpo", groups, beta, keep=1.0), dpo)  # the first update


@settings(max_examples=15)
@given(groups=random_pairs())
def test_one_pair_in_an_update_has_the_optimal_transport_of_dpo(groups: GroupLogps) -> None:
    first = groups_of(*(_answers(groups)[:1]))
    for name in ("aot", "aot-unpaired"):
        assert same(losses_of(name, first), losses_of("dpo", first))


def _answers(groups: GroupLogps) -> list[list[Answer]]:
    columns = (groups.policy_logps, groups.reference_logps, groups.lengths, groups.roles)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    made = [Answer(p, r, int(n), role) for p, r, n, role in rows]
    return [made[i : i + 2] for i in range(0, len(made), 2)]


SCORED = [
    Answer(-9.3, -9.0, score=3.0),
    Answer(-7.1, -8.4, score=1.0),
    Answer(-12.6, -11.2, score=3.0),
    Answer(-4.8, -5.1, score=0.5),
    Answer(-6.0, -6.0, score=2.0),
]


@pytest.mark.parametrize("name", LIST_METHODS)
@given(order=st.permutations(range(5)))
@settings(max_examples=15)
def test_the_order_of_scored_completions_does_not_matter(name: str, order: list[int]) -> None:
    # best-worst takes the first of several that are equally good, so here one is the best.
    scored = [SCORED[0]._replace(score=4.0), *SCORED[1:]] if name == "best-worst" else SCORED
    expected = losses_of(name, groups_of(scored))
    assert same(losses_of(name, groups_of([scored[i] for i in order])), expected)


@pytest.mark.parametrize("name", LIST_METHODS)
@given(order=st.permutations(range(5)))
@settings(max_examples=15)
def test_the_order_does_not_matter_at_policy_equal_to_reference(
    name: str, order: list[int]
) -> None:
    start = [one._replace(policy=one.reference) for one in SCORED]
    expected = losses_of(name, groups_of(start))
    assert same(losses_of(name, groups_of([start[i] for i in order])), expected)


@pytest.mark.parametrize("name", LIST_METHODS)
def test_a_longer_list_in_the_update_changes_no_loss_and_no_gradient(name: str) -> None:
    short = [SCORED[0], SCORED[1], SCORED[3]]
    alone, filled = groups_of(short), groups_of(SCORED, short)
    found = []
    for groups in (alone, filled):
        policy = groups.policy_logps.requires_grad_()
        loss = losses_of(name, groups)[-1]
        (slopes,) = torch.autograd.grad(loss, policy)
        found.append([loss.item(), *slopes[-3:].tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.parametrize("name", LIST_METHODS)
def test_lists_are_learned_from_policy_equal_to_reference(name: str) -> None:
    groups = groups_of([one._replace(policy=one.reference) for one in SCORED])
    policy = groups.policy_logps.requires_grad_()
    (slopes,) = torch.autograd.grad(losses_of(name, groups).sum(), policy)
    assert slopes[0] < 0 < slopes[3]  # the first is among the best, the fourth is the worst


@pytest.mark.parametrize("name", ["plackett-luce", "lipo", "softmax-dpo"])
def test_completions_that_are_equally_good_are_not_compared(name: str) -> None:
    tied = [one._replace(score=1.0) for one in SCORED[:2]]
    groups = groups_of(tied)
    policy = groups.policy_logps.requires_grad_()
    losses = losses_of(name, groups)
    (slopes,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.tolist() == [0.0]
    assert slopes.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", METHODS)
def test_no_groups_have_no_losses(name: str) -> None:
    groups = differentiable(name)
    objective = objective_of(name)
    statistics = with_statistics(objective, groups).statistics
    whole = {key: value for key, value in statistics.items() if value.ndim == 0}
    each = {key: value[:0] for key, value in statistics.items() if value.ndim == 1}
    assert objective.losses(replace(groups.empty, statistics=whole | each)).shape == (0,)


def test_an_objective_of_several_methods_is_their_weighted_sum() -> None:
    groups = differentiable("dpo")
    mixed = Objective(objective_of("mpo").terms)
    expected = 0.8 * losses_of("dpo", groups) + 0.2 * losses_of("bco", groups)
    expected = expected + losses_of("sft", groups)
    assert same(mixed.losses(with_statistics(mixed, groups)), expected)
    assert np.isnan(mixed.initial_value or np.nan)  # sft has none
