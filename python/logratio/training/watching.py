"""What observes a run: metrics, speed, trackers, report. It neither stops nor delays the run."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from logratio.data.feed import MicroBatch
from logratio.data.store.row_report import DataReport
from logratio.progress import say
from logratio.report.falling import Fall, FallDetector
from logratio.training.callbacks import RunState
from logratio.training.drawing import Drawing
from logratio.training.metrics import MetricsLog, progress_note
from logratio.training.models import precision_of
from logratio.training.parallel.processes import Processes
from logratio.training.run_info import resolved_settings, write_run_info
from logratio.training.speed import Count, Speedometer, Work, peak_flops
from logratio.training.trackers import close_all, reporters_of, trackers_of

if TYPE_CHECKING:
    from logratio.training.held_out import HeldOutResult


class Unwatched:
    """A process whose run is recorded by the first one, which it tells what it computes.

    Args:
        processes: The processes of the run.
    """

    def __init__(self, processes: Processes) -> None:
        self._total, self._count = processes.total_of_data, Count()

    def counted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Begin an update: yield its micro-batches, and count their tokens."""
        self._count = Count()
        return map(self._count.add, batches)

    def updated(self, _step: int, _values: dict[str, float]) -> str:
        """End an update."""
        self._count.over_all(self._total)
        return ""

    def evaluated(self, _result: "HeldOutResult") -> None:
        """End an evaluation."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the run."""


class Watch(Unwatched):
    """Records the updates and evaluations of a run, in a `with` block.

    Args:
        state: The run; its `step` is the number of updates that an earlier process has done.
        data: The report on the rows of the data.
        drawing: The HTML report.
        processes: The processes of the run; speeds are those of all together.
    """

    def __init__(
        self, state: RunState, data: DataReport, drawing: Drawing, processes: Processes
    ) -> None:
        super().__init__(processes)
        config, output = state.config, Path(state.config.output)
        device = next(state.policy.parameters()).device
        peak = peak_flops(device, config.device, precision_of(config))
        peak *= processes.count
        self._speed = Speedometer(Work.of(state.policy), peak, device, processes.total_of_data)
        wants_events = "tensorboard" in trackers_of(config.report_to)
        self._log = MetricsLog(output, state.step, tensorboard=wants_events)
        self._reporters = reporters_of(config, resolved_settings(config))
        self._falling, self._has_warned = FallDetector(), False
        write_run_info(config, state.updates, device, data)
        self._drawing = drawing
        drawing.announce()

    def counted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Begin an update: yield its micro-batches, and count their tokens."""
        return self._speed.counted(batches)

    def updated(self, step: int, values: dict[str, float]) -> str:
        """Record the metrics of an update; return a short text for the progress line."""
        speed = self._speed.figures()
        self._log.write(step, values, speed)
        for one in self._reporters:
            one.send(step, values | speed)
        self._warn(self._falling.update({"step": step, **values}))
        self._drawing.request()
        return f"{progress_note(values)}, {self._speed.note()}"

    def evaluated(self, result: "HeldOutResult") -> None:
        """Record an evaluation."""
        row = result.to_dict()
        self._log.write_evaluation(row, result.metrics, result.sample_rows())
        for one in self._reporters:
            one.send(result.step, result.metrics, result.sample_rows())
        self._warn(self._falling.evaluation(row))

    def _warn(self, fall: Fall | None) -> None:
        """Print the first warning."""
        if fall and not self._has_warned:
            self._has_warned = True
            say(f"warning: {fall.to_text()}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._log.close()
        close_all(self._reporters, failed=kind is not None)
        if kind:
            self._drawing.leave()
