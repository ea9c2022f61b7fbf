"""Calibration, and histograms that evaluations keep."""

import json
import math

import numpy as np
import pytest

from logratio.data.analysis.distributions import BINS, calibration, distributions, histogram


def test_counts_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.standard_normal(200) + 1, rng.standard_normal(200)
    found = json.loads(json.dumps(distributions(chosen, rejected)))
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    weights = [1 / (1 + math.exp(margin)) for margin in margins]
    expected = {
        "rewards": {"chosen": list(chosen), "rejected": list(rejected)},
        "margins": {"margin": margins},
        "gradient_weights": {"weight": weights},
    }
    for name, values in expected.items():
        low, high = found[name]["ends"]
        every = [one for part in values.values() for one in part]
        assert (low, high) == ((0, 1) if "weight" in name else (min(every), max(every)))
        for side, numbers in values.items():
            counts = [0] * BINS
            for number in numbers:
                counts[min(int((number - low) / (high - low) * BINS), BINS - 1)] += 1
            assert found[name]["counts"][side] == counts
    assert sum(pairs for pairs, _, _ in found["calibration"]) == 200


def test_equal_and_huge_values_have_a_histogram() -> None:
    found = histogram({"a": np.zeros(3)})
    assert found["ends"] == [-0.5, 0.5]
    assert sum(found["counts"]["a"]) == 3
    far = distributions(np.array([1e4, 0.0]), np.array([0.0, 1e4]))
    counts = far["gradient_weights"]["counts"]["weight"]
    assert (counts[0], counts[-1]) == (1, 1)


def test_calibration_by_hand() -> None:
    margins = np.array([0.0, 4.0, 4.0, -4.0])
    confident = 1 / (1 + math.exp(-4))
    result = calibration(margins)
    assert result.bins == [
        (1, 0.5, 0.5),
        (3, pytest.approx(confident), pytest.approx(2 / 3)),
    ]
    assert result.expected_error == pytest.approx(0.75 * (confident - 2 / 3))
