"""Summarise the records of rounds in a row: ratios per round, median and spread.

`ratio` is the pairs per second of one arm over the other's, over all measured updates, and
`memory_ratio` the ratio of their peaks above the model. A row is flagged if the control, ours run
twice, differs from 1 by more than FLAGGED.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

Record = Mapping[str, Any]
Rounds = Sequence[Mapping[str, Record]]
"""For each round, the record of each arm."""

RESAMPLES = 10_000
FLAGGED = 0.05


def steady_seconds(record: Record, warmup: int) -> float:
    """Add up the measured updates."""
    return float(sum(record["seconds"][warmup:]))


def cold_seconds(record: Record) -> float:
    """Add up all updates, and the reference's pass before them where there was one."""
    return float(sum(record["seconds"])) + (record.get("reference_seconds") or 0.0)


def interval(values: Sequence[float]) -> list[float] | None:
    """Bootstrap a 95 % interval of the median; None of one value."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def speed_ratios(rounds: Rounds, arm: str, against: str, warmup: int, *, cold: bool) -> list[float]:
    """Return pairs a second of `arm` over those of `against`, a value a round."""

    def seconds(record: Record) -> float:
        return cold_seconds(record) if cold else steady_seconds(record, warmup)

    return [seconds(found[against]) / seconds(found[arm]) for found in rounds]


def memory_ratios(rounds: Rounds, arm: str, against: str, name: str) -> list[float]:
    """Return the memory `name` of `arm` over that of `against`, a value a round."""
    return [found[arm]["memory"][name] / found[against]["memory"][name] for found in rounds]


def compare(rounds: Rounds, arm: str, against: str, warmup: int) -> dict[str, Any]:
    """Return ratios and raw figures of two arms; for `ours-cold`, the reference's pass counts."""
    cold = arm == "ours-cold"
    ratios = speed_ratios(rounds, arm, against, warmup, cold=cold)
    return {
        "arm": arm,
        "against": against,
        "timed": "cold" if cold else "steady",
        "ratio": median(ratios),
        "interval": interval(ratios),
        "ratios": ratios,
        "memory_ratio": median(memory_ratios(rounds, arm, against, "above_model")),
        "memory_ratio_without_moments": median(
            memory_ratios(rounds, arm, against, "above_model_and_moments")
        ),
        "seconds": {name: [found[name]["seconds"] for found in rounds] for name in (arm, against)},
        "reference_seconds": {
            name: [found[name].get("reference_seconds") for found in rounds]
            for name in (arm, against)
        },
        "memory": {name: [found[name]["memory"] for found in rounds] for name in (arm, against)},
        "losses": {
            name: [update["loss"] for update in rounds[0][name]["metrics"]]
            for name in (arm, against)
        },
        "pairs": rounds[0][arm]["pairs"],
    }


def control(rounds: Rounds, warmup: int) -> dict[str, Any]:
    """Return the ratio of two runs of ours, a measure of the machine's noise."""
    ratios = speed_ratios(rounds, "ours-again", "ours", warmup, cold=False)
    middle = median(ratios)
    return {
        "control": {"ratio": middle, "ratios": ratios},
        "flagged": abs(middle - 1) > FLAGGED,
    }
