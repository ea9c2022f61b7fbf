"""Warnings about the method of a run, given before it starts."""

from collections.abc import Iterator

import numpy as np
import torch

from logratio._rust import Store
from logratio.data.records import CODES
from logratio.training.methods.group_data import group_weights
from logratio.training.methods.logps import CHOSEN, REJECTED, GroupLogps, PairLogps
from logratio.training.methods.objective import Objective, Term

BALANCE = (1.0, 4 / 3)
"""Range of λ_D n_D / (λ_U n_U) that TRL advises for KTO, after arXiv 2402.01306, eq. 8."""
ROUNDING = 0.01
"""How far outside the range a ratio may be: weights are given with few digits."""


def notes_of(store: Store, objective: Objective) -> list[str]:
    """Return warnings about the methods of a run, for the groups that they train on.

    Args:
        store: The groups.
        objective: The objective; its groups are of the right kind.
    """
    found = [note for term in objective.terms for note in _balance(store, term)]
    return found + [_direction(term) for term in objective.terms if goes_the_other_way(term)]


def _balance(store: Store, term: Term) -> Iterator[str]:
    """Yield what to change if the weights of good and bad answers are out of balance."""
    if "desirable_weight" not in term.options:
        return
    good, bad = _masses(store)
    desirable, undesirable = term.options["desirable_weight"], term.options["undesirable_weight"]
    if not (good and bad):  # the data's report has this
        return
    ratio, (low, high) = desirable * good / (undesirable * bad), BALANCE
    if low - ROUNDING <= ratio <= high + ROUNDING:
        return
    one, other = undesirable * bad / good, desirable * good / bad
    yield _written(
        "W528",
        f"their weights are {ratio:.3g} to 1, and {low:g} to {high:.3g} is advised: give "
        f"--loss-option desirable_weight={one * low:.3g} to {one * high:.3g}, or "
        f"undesirable_weight={other / high:.3g} to {other / low:.3g}",
    )


def _masses(store: Store) -> tuple[float, float]:
    """Return the sums of the weights of the good and of the bad answers."""
    offsets = store.completion_offsets()
    weights, roles = group_weights(store.values(), offsets), store.roles()[offsets[:-1]]
    each = np.ones(len(store)) if weights is None else weights
    return float(each[roles == CHOSEN].sum()), float(each[roles == REJECTED].sum())


def goes_the_other_way(term: Term) -> bool:
    """Return whether the first update lowers the chosen and raises the rejected answer of a pair.

    The gradient is computed at policy = reference, with equal lengths.
    """
    if term.method.takes is not PairLogps or not term.method.needs_reference or ":" in term.name:
        return False
    if term.method.statistics:  # symmetric losses around a mean of the update
        return False
    start = torch.full((2,), -20.0, dtype=torch.float64)
    policy = start.clone().requires_grad_()
    groups = GroupLogps(
        policy,
        start,
        torch.full((2,), 10.0, dtype=torch.float64),
        torch.tensor([CHOSEN, REJECTED], dtype=torch.uint8),
        np.array([0, 2]),
        np.array([[np.nan, np.nan, 1.0, np.nan]] * 2, np.float32),
    )
    (slopes,) = torch.autograd.grad(term.losses(groups).sum(), policy)
    return bool(slopes[0] - slopes[1] > 0)


def _direction(term: Term) -> str:
    options = ", ".join(f"{name} {value:g}" for name, value in term.options.items())
    more = f"`logratio methods {term.name}` has the formula"
    return _written("W529", f"{term.name} with {options}, if policy = reference; {more}")


def _written(code: str, text: str) -> str:
    return f"[{code}] {CODES[code]}: {text}"
