"""How held-out rewards are distributed: their calibration, and histograms to keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 40
"""Bins of a histogram."""
TENTHS = 10
"""Bins of the confidence, each a tenth of [0.5, 1]."""


@dataclass(frozen=True)
class Calibration:
    """Calibration of the implied preference probabilities.

    Attributes:
        expected_error: Expected calibration error: mean |confidence − accuracy| over pairs (Guo
            et al. 2017, arXiv 1706.04599, eq. 3).
        bins: (pairs, mean confidence, share correct) for each non-empty tenth of [0.5, 1].
    """

    expected_error: float
    bins: list[tuple[int, float, float]]


def calibration(margins: np.ndarray) -> Calibration:
    """Compare the confidence max(σ(m), σ(−m)) of reward margins with their accuracy.

    Args:
        margins: Chosen minus rejected reward of each pair, float64 `[B]`.
    """
    confidence = 1 / (1 + np.exp(-np.abs(np.clip(margins, -700, 700))))
    right = (np.sign(margins) + 1) / 2
    which = np.minimum(((confidence - 0.5) * 2 * TENTHS).astype(int), TENTHS - 1)
    bins = [
        (int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        for bin_number in range(TENTHS)
        if (inside := which == bin_number).any()
    ]
    error = sum(n * abs(mean - share) for n, mean, share in bins) / len(margins)
    return Calibration(float(error), bins)


def distributions(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """Return how the rewards of pairs are distributed, as JSON has it.

    Args:
        chosen: Rewards of the chosen completions, float64 `[B]`.
        rejected: Rewards of the rejected completions, float64 `[B]`.

    Returns:
        Histograms of the rewards, of the margins and of the weights σ(−margin) that DPO's gradient
        gives to the pairs; and the bins of `Calibration`. A histogram has both ends of its range
        and, for each name, the counts of `BINS` equal bins.
    """
    margins = chosen - rejected
    weights = np.exp(-np.logaddexp(0.0, margins))
    return {
        "rewards": histogram({"chosen": chosen, "rejected": rejected}),
        "margins": histogram({"margin": margins}),
        "gradient_weights": histogram({"weight": weights}, (0.0, 1.0)),
        "calibration": [list(one) for one in calibration(margins).bins],
    }


def histogram(
    values: Mapping[str, np.ndarray], ends: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Count values in equal bins, the same ones for all names.

    Args:
        values: Finite values by name.
        ends: Both ends of the range; None: those of the values.
    """
    every = np.concatenate(list(values.values()))
    low, high = ends or (float(every.min()), float(every.max()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = {name: np.histogram(one, BINS, (low, high))[0] for name, one in values.items()}
    return {"ends": [low, high], "counts": {name: one.tolist() for name, one in counts.items()}}
