"""Histograms of an evaluation, small enough to be kept with each of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from logratio.training.evaluation import calibration

BINS = 40


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
