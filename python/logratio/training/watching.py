"""What observes a run: files of metrics, trackers. None of it can stop or delay the run."""

from pathlib import Path
from typing import TYPE_CHECKING

from logratio.training.config import TrainConfig
from logratio.training.metrics import MetricsLog
from logratio.training.trackers import close_all, reporters_of, trackers_of

if TYPE_CHECKING:
    from logratio.training.held_out import HeldOutResult


class Watch:
    """Records the updates and evaluations of a run, from a `with` block.

    Args:
        config: Settings of the run.
        start: Number of updates that an earlier process has done.
    """

    def __init__(self, config: TrainConfig, start: int) -> None:
        output = Path(config.output)
        wants_events = "tensorboard" in trackers_of(config.report_to)
        self._log = MetricsLog(output, start, tensorboard=wants_events)
        self._reporters = reporters_of(config, output)

    def updated(self, step: int, values: dict[str, float]) -> str:
        """Record the metrics of an update; return a short text for the progress line."""
        self._log.write(step, values)
        for one in self._reporters:
            one.send(step, values)
        return _note(values)

    def evaluated(self, result: "HeldOutResult") -> None:
        """Record an evaluation."""
        self._log.write_evaluation(result.to_dict(), result.metrics, result.sample_rows())
        for one in self._reporters:
            one.send(result.step, result.metrics)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._log.close()
        close_all(self._reporters, failed=kind is not None)


def _note(values: dict[str, float]) -> str:
    note = f"loss {values['loss']:.4f}"
    if "rewards/accuracies" in values:
        note += f" acc {values['rewards/accuracies']:.2f} margin {values['rewards/margins']:.3f}"
    return note
