"""The error of an update whose loss or gradient is not finite, with its likely cause."""

import math
from collections.abc import Mapping, Sequence

from logratio.errors import LogratioError


class NonFiniteError(LogratioError, ArithmeticError):
    """A loss or gradient is NaN or infinite; the weights were not updated with it."""


def not_finite(
    step: int,
    values: Mapping[str, float],
    recent: Sequence[Mapping[str, float]],
    records: str,
) -> str:
    """Describe the non-finite values of an update, their records and the likely cause.

    Args:
        step: Number of the update.
        values: Its metrics, with the learning rate as `lr`.
        recent: Metrics of the preceding updates.
        records: Names of the records whose log-probs are not finite.
    """
    bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
    return (
        f"update {step}: {bad} not finite; stopped before updating the weights "
        f"(records: {records}). {_likely_cause(values['lr'], recent)}"
    )


def _likely_cause(rate: float, recent: Sequence[Mapping[str, float]]) -> str:
    if not recent:
        return "This is the first update, so the cause is the model or these records"
    norms = ", ".join(f"{row['grad_norm']:.3g}" for row in recent)
    losses = ", ".join(f"{row['loss']:.3g}" for row in recent)
    highest = max(row["lr"] for row in recent)
    return (
        f"The last updates had gradient norms {norms} and losses {losses} at learning rates "
        f"up to {highest:.3g} (now {rate:.3g}): the usual cause is a learning rate that is too "
        f"high, so try --lr {highest / 10:.3g}"
    )
