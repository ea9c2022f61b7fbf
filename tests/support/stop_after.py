"""Interrupting a run after an update, as a signal does."""

import os
import signal

import pytest

from logratio.training.trainer import DPOTrainer


class stop_after:  # noqa: N801 - reads as a context
    """Send SIGTERM to this process in the middle of an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        update = DPOTrainer._update

        def interrupted(
            trainer: DPOTrainer, step: int, *rest: object
        ) -> tuple[dict[str, float], int]:
            if step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(trainer, step, *rest)  # type: ignore[arg-type]

        self.patch.setattr(DPOTrainer, "_update", interrupted)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
