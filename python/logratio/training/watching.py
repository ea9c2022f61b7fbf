"""What observes a run: files of metrics, trackers, speed. It can neither stop nor delay the run."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from logratio.data.feed import MicroBatch
from logratio.training.config import TrainConfig
from logratio.training.metrics import MetricsLog
from logratio.training.models import precision_of
from logratio.training.speed import Speedometer, Work, peak_flops
from logratio.training.trackers import close_all, reporters_of, trackers_of

if TYPE_CHECKING:
    from logratio.training.held_out import HeldOutResult


class Watch:
    """Records the updates and evaluations of a run, from a `with` block.

    Args:
        config: Settings of the run.
        start: Number of updates that an earlier process has done.
        policy: The model that is trained.
    """

    def __init__(self, config: TrainConfig, start: int, policy: nn.Module) -> None:
        output, device = Path(config.output), next(policy.parameters()).device
        peak = peak_flops(device, config.device, precision_of(config))
        self._speed = Speedometer(Work.of(policy), peak, device)
        wants_events = "tensorboard" in trackers_of(config.report_to)
        self._log = MetricsLog(output, start, tensorboard=wants_events)
        self._reporters = reporters_of(config, output)

    def counted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Begin an update: yield its micro-batches, and count their tokens."""
        return self._speed.counted(batches)

    def updated(self, step: int, values: dict[str, float]) -> str:
        """Record the metrics of an update; return a short text for the progress line."""
        speed = self._speed.figures()
        self._log.write(step, values, speed)
        for one in self._reporters:
            one.send(step, values | speed)
        return f"{_note(values)}, {self._speed.note()}"

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
