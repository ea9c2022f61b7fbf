"""Detect that chosen and rejected completions both become less likely in a run.

A preference loss increases the difference of their log-probs, which also grows if both fall and the
rejected one falls faster; the probability then moves to completions that are in no pair
(likelihood displacement, Razin et al. 2024, arXiv 2410.08847).
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 20
"""Number of updates whose mean log-ratios are looked at."""
LEAST = 1.0
"""Mean fall in nats per completion that counts: a completion is then e times less likely."""


@dataclass(frozen=True)
class Fall:
    """Both sides of the pairs have become less likely.

    Attributes:
        step: Number of updates done.
        chosen, rejected: Mean change of the log-probs in nats per completion, negative.
        where: The pairs that it was measured on.
    """

    step: int
    chosen: float
    rejected: float
    where: str

    def to_text(self) -> str:
        """Return a warning with remedies."""
        return (
            f"after update {self.step:,} chosen and rejected completions are both less likely than "
            f"at the start: {self.chosen:.1f} and {self.rejected:.1f} nats per completion "
            f"({self.where}). Probability moves to completions that are in no pair. Remedies: a "
            "lower lr, fewer updates, a larger beta, or leaving out pairs whose completions are "
            "nearly equal"
        )


def has_both(row: Mapping[str, Any], name: str) -> bool:
    """Return whether a row has a metric of chosen and of rejected completions."""
    return f"{name}/chosen" in row and f"{name}/rejected" in row


class FallDetector:
    """Looks at the rows of a run one after the other."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._first: tuple[float, float] | None = None

    def update(self, row: Mapping[str, Any]) -> Fall | None:
        """Look at the row of an update, with the number of updates as `step`.

        Each update has other pairs, so only log-ratios to the reference are compared: their mean
        over `WINDOW` updates must be below -`LEAST` and two standard errors below 0.
        """
        if not has_both(row, "logratios"):  # single answers: an update may lack one kind
            return None
        self._recent.append((row["logratios/chosen"], row["logratios/rejected"]))
        if len(self._recent) < WINDOW:
            return None
        chosen, rejected = (sum(side) / WINDOW for side in zip(*self._recent, strict=True))
        if max(chosen, rejected) > -LEAST:
            return None
        errors = np.std(self._recent, 0, ddof=1) / np.sqrt(WINDOW)
        if (np.array([chosen, rejected]) + 2 * errors > 0).any():
            return None
        return Fall(row["step"], chosen, rejected, f"mean of the last {WINDOW} updates")

    def evaluation(self, row: Mapping[str, Any]) -> Fall | None:
        """Look at an evaluation: the log-ratios of the held-out pairs.

        Without a reference, their log-probs are compared with those of the first evaluation.
        """
        names = "eval_logratios", "eval_logps"
        kind = next((name for name in names if has_both(row, name)), None)
        if kind is None:
            return None
        now = row[f"{kind}/chosen"], row[f"{kind}/rejected"]
        self._first = self._first or (now if kind == "eval_logps" else (0.0, 0.0))
        chosen, rejected = (value - first for value, first in zip(now, self._first, strict=True))
        if max(chosen, rejected) > -LEAST:
            return None
        return Fall(row["step"], chosen, rejected, "held-out pairs")


def last_fall(
    metrics: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]
) -> Fall | None:
    """Return the fall at the end of a run: of held-out pairs if there are any, else in training."""
    detector = FallDetector()
    trained = [detector.update(row) for row in metrics]
    held_out = [detector.evaluation(row) for row in evaluations if "eval_logps/rejected" in row]
    return (held_out or trained or [None])[-1]
