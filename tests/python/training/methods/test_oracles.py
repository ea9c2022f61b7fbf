"""Every loss against an oracle in plain Python floats, over several updates of random groups."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import NAN, Answer, bad, good, groups_of, objective_of, pair, with_statistics
from loss_oracles import ORACLES, Memory, Update, grades_of

from logratio.training.methods.method import DataKind, Method, Option
from logratio.training.methods.table import METHODS

# Multiples of 1/16, so that equal numbers are frequent and differences are exact.
sixteenths = st.integers(-480, -1).map(lambda n: n / 16)
few_sixteenths = st.integers(0, 40).map(lambda n: n / 16)
answers = st.tuples(sixteenths, sixteenths, st.integers(1, 40), few_sixteenths, few_sixteenths).map(
    lambda one: Answer(*one[:3], confidence=1 - one[3], divergence=one[4])
)
pairs = st.builds(pair, answers, answers, st.sampled_from([0.25, 1.0, 3.5]))
scores = st.integers(0, 3).map(float)


@st.composite
def lists(draw: st.DrawFn) -> list[Answer]:
    """2 to 5 answers; all, some or none have a score, and all, some or none a rank."""
    group = draw(st.lists(answers, min_size=2, max_size=5))
    columns = []
    for _ in ("score", "rank"):
        one_missing = st.integers(0, len(group) - 1).map(lambda place: {place})
        missing = draw(st.sampled_from([set(), set(range(len(group)))]) | one_missing)
        columns.append([NAN if i in missing else draw(scores) for i in range(len(group))])
    return [
        one._replace(score=score, rank=rank)
        for one, score, rank in zip(group, *columns, strict=True)
    ]


def differs(group: Sequence[Answer]) -> bool:
    """Whether a list compares any answers; data of which none are compared is refused."""
    return len(set(grades_of(group))) > 1


KINDS: dict[DataKind, st.SearchStrategy[Any]] = {
    "pairs": pairs,
    "labelled answers": st.one_of(
        st.builds(good, answers, st.none() | answers), st.builds(bad, answers, st.none() | answers)
    ),
    "lists": lists().filter(differs),
    "demonstrations": answers.map(lambda one: [one]),
}


def within(option: Option) -> st.SearchStrategy[float]:
    """Values of an option: its default, and others in its range."""
    low, high = max(option.low, 0.0), min(option.high, 5.0)
    inner = [low + share * (high - low) for share in (0.05, 0.4, 0.9)]
    return st.sampled_from([option.default, *inner])


@st.composite
def runs(draw: st.DrawFn, method: Method) -> tuple[dict[str, float], list[Update]]:
    """β and options of a method, and the groups of some updates."""
    numbers = {name: draw(within(option)) for name, option in method.options.items()}
    if method.beta is not None:
        numbers["beta"] = draw(st.sampled_from([1e-3, 0.05, 0.1, 1.0, 2.5, 10.0]))
    updates = st.lists(KINDS[method.data], min_size=1, max_size=5)
    return numbers, draw(st.lists(updates, min_size=1, max_size=3))


def test_every_method_has_an_oracle() -> None:
    assert ORACLES.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=15)
@given(data=st.data())
def test_losses_of_several_updates_agree_with_the_oracle(name: str, data: st.DataObject) -> None:
    numbers, updates = data.draw(runs(METHODS[name]))
    objective = objective_of(name, **numbers)
    memory: Memory = {}
    for update in updates:
        losses = objective.losses(with_statistics(objective, groups_of(*update)))
        expected = ORACLES[name](update, memory, **numbers)
        assert losses.dtype == torch.float64
        assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-10)
