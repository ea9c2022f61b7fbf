"""95 % intervals: Wilson's for every share, such as an accuracy, and the normal one for means."""

from math import isfinite, sqrt

_Z = 1.959963984540054

Interval = tuple[float, float]


def wilson(share: float, count: float) -> Interval:
    """Return Wilson's 95 % score interval of a share in ``count`` independent trials.

    It is inside [0, 1], also for shares of 0 and 1. For a mean of values in [0, 1] (a tie counts
    one half) it is conservative, because their variance is not larger.
    """
    if count <= 0:
        return 0.0, 1.0
    half = _Z * sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    middle = share + _Z**2 / (2 * count)
    scale = 1 + _Z**2 / count
    # At shares of 0 and 1 the share is an end of the interval; rounding must not exclude it.
    return min(share, (middle - half) / scale), max(share, (middle + half) / scale)


def around(estimate: float, variance: float) -> Interval:
    """Return the normal 95 % interval of an estimate with this variance."""
    return estimate - _Z * sqrt(variance), estimate + _Z * sqrt(variance)


def spread(error: float) -> str:
    """Format half of the normal 95 % interval of a mean, as " ± 0.52".

    Args:
        error: The standard error of the mean; NaN if it has only one observation.

    Returns:
        Two significant digits; empty without a standard error.
    """
    return f" ± {_Z * error:.2g}" if isfinite(error) else ""
