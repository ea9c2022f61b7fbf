"""The guard against stuck runs: when it ends one, and when not."""

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from logratio.training import stall_guard
from logratio.training.stall_guard import ON_GPU, PATIENT, StallGuard


class EndedError(Exception):
    """In place of the end of the process."""


@pytest.fixture(autouse=True)
def _survivable(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(reason: str) -> NoReturn:
        raise EndedError(reason)

    monkeypatch.setattr(stall_guard, "end_process", end)


class Clock(threading.Event):
    """An event that is never waited for: each wait calls `work` instead."""

    def __init__(self, work: Callable[[int], object], steps: int) -> None:
        super().__init__()
        self.work, self.steps, self.seconds = work, steps, 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds += timeout or 0.0
        self.steps -= 1
        self.work(self.steps)
        return self.steps == 0


def watch(guard: StallGuard, work: Callable[[int], Any], steps: int = 10_000) -> float:
    """Let a guard look at `work`, step by step; return the seconds that it counted."""
    clock = Clock(work, steps)
    try:
        guard._watch(clock)
    except EndedError as reason:
        assert "during update 7" in str(reason) or "while saving" in str(reason)
        return clock.seconds
    return -1.0


def test_work_that_reports_nothing_is_ended_after_the_time() -> None:
    guard = StallGuard(60.0)
    guard.enter("during update 7")
    assert watch(guard, lambda _step: None) == 60.0


def test_an_evaluation_or_a_save_may_take_longer_and_the_next_update_may_not() -> None:
    guard = StallGuard(60.0)
    guard.enter("while saving", patient=True)
    assert watch(guard, lambda _step: None) == 60.0 * PATIENT
    guard.enter("during update 7")
    assert watch(guard, lambda _step: None) == 60.0


def test_work_that_reports_now_and_then_is_never_ended() -> None:
    guard = StallGuard(60.0)
    assert watch(guard, lambda step: guard.moved() if step % 59 == 0 else None) == -1.0


def test_every_micro_batch_is_a_report() -> None:
    guard = StallGuard(60.0)
    batches: Any = guard.counted(iter([object()] * 20_000))  # type: ignore[list-item]
    assert watch(guard, lambda _step: next(batches)) == -1.0


def test_defaults_depend_on_the_device() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert StallGuard.of(None, gpu)._seconds == ON_GPU
    assert StallGuard.of(None, cpu)._seconds == 0
    for given in (0.0, 90.0):
        assert StallGuard.of(given, cpu)._seconds == StallGuard.of(given, gpu)._seconds == given


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_guard_has_a_thread_while_it_watches_unless_it_is_off(seconds: float) -> None:
    def watches() -> bool:
        return any(thread.name == "logratio-stalls" for thread in threading.enumerate())

    with StallGuard(seconds).watching():
        assert watches() == bool(seconds)
