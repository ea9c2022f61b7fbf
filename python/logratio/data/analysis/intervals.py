"""Intervals of 95 %, by formulas that need no library of statistics, and how they are written."""

from math import sqrt

_Z = 1.959963984540054

Interval = tuple[float, float]


def wilson(share: float, count: float) -> Interval:
    """Return Wilson's score interval of a share that was seen in ``count`` independent trials.

    It stays inside [0, 1] and holds for shares of 0 and 1. For a mean of values in [0, 1] that may
    lie between (a tie counts one half) it is conservative: their variance is not larger.
    """
    if count <= 0:
        return 0.0, 1.0
    spread = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    middle = share + _Z**2 / (2 * count)
    scale = 1 + _Z**2 / count
    # Rounding may not push an end past the share itself, which lies on it at 0 and at 1.
    return min(share, (middle - spread) / scale), max(share, (middle + spread) / scale)


def written(value: float, digits: int, *, sign: bool = False) -> str:
    """Write a number with a minus that is one, and no −0; ``sign`` writes a plus too."""
    value = round(value, digits) or 0.0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def around(estimate: float, variance: float) -> Interval:
    """Return the normal interval of an estimate with this variance."""
    return estimate - _Z * sqrt(variance), estimate + _Z * sqrt(variance)
