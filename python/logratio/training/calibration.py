"""Does σ(margin), read as the probability that the label is right, come true?"""

from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Reliability by confidence, and its summary.

    Attributes:
        expected_error: mean |confidence − accuracy| over pairs (ECE; Guo et al. 2017, arXiv
            1706.04599, eq. 3).
        bins: for each non-empty tenth of [0.5, 1]: pairs, mean confidence, share right.
    """

    expected_error: float
    bins: list[tuple[int, float, float]]


def calibration(margins: np.ndarray) -> Calibration:
    """Compare confidence max(σ(m), σ(−m)) with how often the sign of the margin `m` is right."""
    confidence = 1 / (1 + np.exp(-np.abs(np.clip(margins, -700, 700))))
    right = (np.sign(margins) + 1) / 2
    which = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        (int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        for bin_number in range(BINS)
        if (inside := which == bin_number).any()
    ]
    error = sum(n * abs(mean - share) for n, mean, share in bins) / len(margins)
    return Calibration(float(error), bins)
