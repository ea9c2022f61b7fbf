"""Interrupting a run after an update, as a signal does."""

import os
import signal

import pytest

from logratio.training.update import Updater


class stop_after:  # noqa: N801 - reads as a context
    """Send SIGTERM to this process in the middle of an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        update = Updater.update

        def interrupted(updater: Updater, step: int, *rest: object) -> tuple[dict[str, float], int]:
            if step == self.step:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(updater, step, *rest)  # type: ignore[arg-type]

        self.patch.setattr(Updater, "update", interrupted)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()
