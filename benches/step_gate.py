"""Check that an arm used the same pairs and computed the same numbers, before its time counts."""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

SUMS = {"fp32": 1e-4, "bf16": 1e-2, "bf16-weights": 1e-2}
"""Relative; the policy's mean sums of the chosen and of the rejected at the first update."""
NORM = {"fp32": 1e-3, "bf16": 5e-2, "bf16-weights": 5e-2}
"""Relative; the gradient's norm at the first update, before it is clipped."""
LOSSES = {"fp32": 1e-3, "bf16": 5e-2, "bf16-weights": 5e-2}
"""Relative; each update's loss, whose rounding differences grow during training."""


class GateError(RuntimeError):
    """An arm did other work than ours, so its time cannot be compared."""


def check(ours: Record, theirs: Record, precision: str) -> dict[str, float]:
    """Compare an arm's record with ours, on the same order of the same pairs.

    Returns:
        The largest relative gap of each kind: sums, grad_norm, losses.

    Raises:
        GateError: the pairs of an update differ, or a gap is beyond its bound.
    """
    for update, (own, other) in enumerate(zip(ours["pairs"], theirs["pairs"], strict=True)):
        if own != other:
            raise GateError(f"{theirs['arm']}: other pairs than ours in update {update}")
    mine, other = ours["metrics"], theirs["metrics"]
    first = {name: gap(mine[0][name], other[0][name]) for name in mine[0]}
    found = {
        "sums": max(first["chosen"], first["rejected"]),
        "grad_norm": first["grad_norm"],
        "losses": max(gap(a["loss"], b["loss"]) for a, b in zip(mine, other, strict=True)),
    }
    bounds = {"sums": SUMS, "grad_norm": NORM, "losses": LOSSES}
    for name, value in found.items():
        if not value <= bounds[name][precision]:  # NaN too
            raise GateError(
                f"{theirs['arm']}: {name} differ from ours by {value:.2g}, and "
                f"{bounds[name][precision]:.2g} is allowed"
            )
    return found


def gap(one: float, other: float) -> float:
    """Return the difference relative to the larger of the two; 0 where both are 0."""
    largest = max(abs(one), abs(other))
    return abs(one - other) / largest if largest else 0.0
