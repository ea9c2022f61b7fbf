"""A simulation of a pass on a GPU by events, as an oracle: three queues and a clock."""

import heapq
from collections.abc import Callable, Sequence
from itertools import count


class Queue:
    """A resource that runs one job after the other, in the order in which they arrive."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation, self._busy = simulation, False
        self._waiting: list[tuple[float, Callable[[], None]]] = []

    def add(self, seconds: float, then: Callable[[], None]) -> None:
        """Run a job of some seconds when those before it have ended, and then call `then`."""
        self._waiting.append((seconds, then))
        self._next()

    def _next(self) -> None:
        if self._busy or not self._waiting:
            return
        self._busy = True
        seconds, then = self._waiting.pop(0)

        def end() -> None:
            self._busy = False
            then()
            self._next()

        self._simulation.after(seconds, end)


class Simulation:
    """Runs steps (compute, gather, reduce, replicate), in seconds, with one gather in advance.

    Compute is the device. Gathers and reductions share one link, replication has another. The
    weights of step k + 1 are requested when step k starts to compute.
    """

    def __init__(self, steps: Sequence[tuple[float, float, float, float]]) -> None:
        self.steps, self.now = steps, 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self.link, self.network = Queue(self), Queue(self)
        self._gathered = [gather == 0 for _, gather, _, _ in steps]
        self._free, self._next_step = True, 0

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function in some seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._number), call))

    def run(self) -> float:
        """Return the time at which all queues are empty."""
        self._request(0)
        self._start()
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()
        assert self._next_step == len(self.steps)
        return self.now

    def _request(self, number: int) -> None:
        if number < len(self.steps) and not self._gathered[number]:
            self.link.add(self.steps[number][1], lambda: self._arrived(number))

    def _arrived(self, number: int) -> None:
        self._gathered[number] = True
        self._start()

    def _start(self) -> None:
        number = self._next_step
        if number == len(self.steps) or not self._free or not self._gathered[number]:
            return
        self._free, self._next_step = False, number + 1
        self._request(number + 1)
        self.after(self.steps[number][0], lambda: self._ended(number))

    def _ended(self, number: int) -> None:
        self._free = True
        _, _, reduce, replicate = self.steps[number]

        def add_up_elsewhere() -> None:
            if replicate:
                self.network.add(replicate, lambda: None)

        if reduce:
            self.link.add(reduce, add_up_elsewhere)
        else:
            add_up_elsewhere()
        self._start()
