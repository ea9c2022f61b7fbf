"""Ctrl-C and SIGTERM end a run after its current step, with its state saved."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from logratio.errors import LogratioError


class RunInterruptedError(LogratioError):
    """A run was stopped by a signal; its state is saved.

    Attributes:
        exit_code: 128 + the signal's number, as shells expect.
    """

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: {where}")
        self.exit_code = 128 + signal_number


@contextmanager
def interrupts() -> Iterator[Callable[[], int | None]]:
    """Catch the first signal inside the block; a second one ends the process at once.

    Yields:
        A function that returns the number of the signal received, or None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Python delivers signals to the main thread only
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
