"""Intervals: Wilson's against published values and draws, the normal one, and its text."""

import numpy as np
import pytest

from logratio.intervals import around, spread, wilson


def test_wilsons_interval() -> None:
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(0.5, 0) == (0, 1)


def test_wilson_intervals_hold_the_share_as_often_as_they_claim() -> None:
    """Against 20,000 draws; a normal interval fails at such shares."""
    rng = np.random.default_rng(0)
    for share, count in ((0.9, 40), (0.5, 30)):
        drawn = rng.binomial(count, share, 20_000) / count
        held = [low <= share <= high for low, high in (wilson(one, count) for one in drawn)]
        assert 0.93 < np.mean(held) < 0.97


def test_wilsons_interval_of_one_trial_is_not_empty() -> None:
    for share in (0.0, 1.0):
        low, high = wilson(share, 1)
        assert low <= share <= high and high - low > 0.7


def test_the_normal_interval_and_its_text() -> None:
    assert around(1.0, 0.25) == pytest.approx((1 - 0.979982, 1 + 0.979982), abs=1e-6)
    assert spread(0.5) == " ± 0.98"
    assert spread(float("nan")) == ""  # a single observation has no standard error
