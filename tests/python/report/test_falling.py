"""The warning that chosen and rejected completions both become less likely."""

from typing import Any

import numpy as np
import pytest

from logratio.report.falling import WINDOW, FallDetector, last_fall


def rows(chosen: float, rejected: float, noise: float = 0.0, count: int = 60) -> list[Any]:
    """Rows of a run whose log-ratios move to these values in equal steps."""
    rng = np.random.default_rng(0)
    return [
        {
            "step": step,
            "logratios/chosen": chosen * step / count + noise * rng.standard_normal(),
            "logratios/rejected": rejected * step / count + noise * rng.standard_normal(),
        }
        for step in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "noise", "falls"),
    [
        (-5.0, -20.0, 0.1, True),
        (-5.0, -20.0, 3.0, True),
        (+3.0, -20.0, 0.1, False),  # a healthy run
        (-0.5, -20.0, 0.1, False),  # too little
        (-20.0, +3.0, 0.1, False),
        (-1.5, -20.0, 20.0, False),  # within the noise
    ],
)
def test_both_must_fall_by_more_than_the_noise(
    chosen: float, rejected: float, noise: float, falls: bool
) -> None:
    fall = last_fall(rows(chosen, rejected, noise), [])
    assert (fall is not None) == falls
    if fall:
        assert fall.step == 60
        expected = chosen * np.mean(range(41, 61)) / 60
        assert fall.chosen == pytest.approx(expected, abs=4 * noise / np.sqrt(WINDOW))


def test_it_is_seen_as_soon_as_it_happens_and_not_before_a_whole_window() -> None:
    detector = FallDetector()
    steps = [row["step"] for row in rows(-12.0, -60.0) if detector.update(row)]
    assert steps[0] == WINDOW
    assert steps == list(range(WINDOW, 61))


def test_held_out_pairs_decide_if_there_are_any() -> None:
    held = {"step": 60, "eval_logratios/chosen": 2.0, "eval_logratios/rejected": -9.0}
    held |= {"eval_logps/chosen": -10.0, "eval_logps/rejected": -30.0}
    assert last_fall(rows(-5.0, -20.0), []) is not None
    assert last_fall(rows(-5.0, -20.0), [held]) is None
    fallen = last_fall([], [held | {"eval_logratios/chosen": -2.0}])
    assert fallen is not None
    assert "-2.0 and -9.0 nats per completion (held-out pairs)" in fallen.to_text()
    assert "larger beta" in fallen.to_text()


def test_without_a_reference_evaluations_are_compared_with_the_first() -> None:
    def at(step: int, chosen: float, rejected: float) -> dict[str, Any]:
        return {"step": step, "eval_logps/chosen": chosen, "eval_logps/rejected": rejected}

    first = at(1, -10.0, -12.0)
    assert last_fall([], [first]) is None
    assert last_fall([], [first, at(2, -9.0, -30.0)]) is None
    fall = last_fall([], [first, at(2, -13.0, -30.0)])
    assert fall is not None
    assert (fall.chosen, fall.rejected) == (-3.0, -18.0)


def test_demonstrations_never_fall() -> None:
    assert last_fall([{"step": 1, "loss": 1.0}] * 30, [{"step": 1, "eval_loss": 1.0}]) is None
