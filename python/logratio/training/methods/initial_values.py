"""Values of the losses at policy = reference, from β and the options, for `Method.initial`."""

import math
from typing import Any


def ln2(**_: Any) -> float:
    """Return ln 2, a logistic loss of the margin 0."""
    return math.log(2)


def two_ln2(**_: Any) -> float:
    """Return 2 ln 2, two logistic losses of 0."""
    return 2 * math.log(2)


def one(**_: Any) -> float:
    """Return 1."""
    return 1.0


def zero(**_: Any) -> float:
    """Return 0."""
    return 0.0


def half(**_: Any) -> float:
    """Return 1/2."""
    return 0.5


def ipo(*, beta: float) -> float:
    """Return the square of the target of mean log-ratios."""
    return 1 / (4 * beta**2)


def sppo(*, beta: float) -> float:
    """Return the squares of both targets, added up."""
    return 1 / (2 * beta**2)


def cal(*, beta: float) -> float:
    """Return those of `sppo`, and ln 2."""
    return 1 / (2 * beta**2) + math.log(2)


def kto(*, desirable_weight: float, undesirable_weight: float, **_: Any) -> float | None:
    """Return half the weight of an answer, if good and bad ones have the same."""
    return desirable_weight / 2 if desirable_weight == undesirable_weight else None


def exo(*, beta: float, label_smoothing: float) -> float:
    """Return the divergence of equal shares from the smoothed labels."""
    return -math.log(2) - (math.log(1 - label_smoothing) + math.log(label_smoothing)) / 2


def discopop(**_: Any) -> float:
    """Return the mean of both parts, whose modulation is 1/2."""
    return (1 + math.log(2)) / 2
