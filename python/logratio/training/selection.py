"""Which evaluation of a run was the best, and when a run stops early."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LOWER_IS_BETTER = ("loss", "kl", "expected_calibration_error", "rewards/rejected")
"""Metrics whose lower values are better; of all others, higher ones are."""


@dataclass
class Selection:
    """The best evaluation so far by one metric, and how many were not better since.

    Attributes:
        metric: Name of the metric, with or without `eval_`; None: no evaluation is preferred.
        patience: Evaluations without a better one after which the run stops; None: never.
        best: The best value so far.
        best_step: Number of updates at the best value.
        waited: Evaluations since.
        evaluated: Number of updates at the last evaluation.
    """

    metric: str | None = None
    patience: int | None = None
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    evaluated: int = 0

    def note(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation into account; return whether it is the best so far.

        Args:
            step: Number of updates done.
            metrics: The evaluation's metrics, whose names begin with `eval_`.
        """
        self.evaluated = step
        if self.metric is None:
            return False
        value = metrics[f"eval_{self.metric.removeprefix('eval_')}"]
        if self.best is None or self._is_better(value, self.best):
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    def _is_better(self, value: float, than: float) -> bool:
        is_lower_better = str(self.metric).removeprefix("eval_") in LOWER_IS_BETTER
        return value < than if is_lower_better else value > than

    @property
    def is_exhausted(self) -> bool:
        """Whether the run should stop: `patience` evaluations in a row were not better."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint keeps."""
        kept = asdict(self)
        return {name: kept[name] for name in ("best", "best_step", "waited", "evaluated")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the values of `state`."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.waited, self.evaluated = state["waited"], state["evaluated"]
