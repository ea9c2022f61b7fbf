"""An event loop whose clock jumps to the next timer, so that minutes of load take a second."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Instead of waiting, move the clock of its loop."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready now; move the clock by the time that it would wait."""
        ready = super().select(0)
        if not ready and timeout:
            self.loop.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop with its own clock; a function of an executor takes the seconds that `lasts` gives.

    Attributes:
        now: The clock, in seconds.
        lasts: Returns the seconds of a function before it is called; 0 by default.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.lasts: Callable[..., float] = lambda *_: 0.0
        selector = _Selector()
        super().__init__(selector)
        selector.loop = self

    def time(self) -> float:
        """Return the clock."""
        return self.now

    def run_in_executor(  # type: ignore[override]  # the types of the arguments do not matter here
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> Any:
        """Call `func` in this thread, and deliver its result later."""
        done, seconds = self.create_future(), self.lasts(func, *args)

        def deliver() -> None:
            if not done.done():
                try:
                    done.set_result(func(*args))
                except Exception as error:
                    done.set_exception(error)

        if seconds:
            self.call_later(seconds, deliver)
        else:
            deliver()
        return done


def in_virtual_time(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine until its end on a new `VirtualLoop`."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()
