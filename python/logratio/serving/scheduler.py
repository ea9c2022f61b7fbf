"""The scheduler: admits or refuses requests, and orders their graph runs in one thread."""

import asyncio
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from logratio.serving.limits import Limits, RefusedError, stopping
from logratio.serving.request_record import current_record

_MEMORY = 64
"""Effective number of recent observations; one that is this old has weight 1/e."""
_SPREAD = 1e-3
"""Relative variance of the sizes below which the two terms cannot be distinguished."""


@dataclass
class Pace:
    """Online linear regression of cost on size: amount = fixed + slope · size.

    The fields are exponentially decayed sums of the weights, sizes, amounts and their products.
    """

    weight: float = 0.0
    size: float = 0.0
    amount: float = 0.0
    size_squared: float = 0.0
    product: float = 0.0

    def learn(self, size: float, amount: float) -> None:
        """Add the size and measured amount of a finished piece of work."""
        new = (1.0, size, amount, size * size, size * amount)
        keep = 1 - 1 / _MEMORY
        for name, value in zip(self.__dataclass_fields__, new, strict=True):
            setattr(self, name, getattr(self, name) * keep + value)

    def of(self, size: float, pieces: int = 1) -> float:
        """Return the expected amount for `size` in `pieces` pieces; 0 before any observation."""
        fixed, slope = self._line()
        return fixed * pieces + slope * size

    def _line(self) -> tuple[float, float]:
        """Return the fixed cost of a piece and the slope per unit of size, both at least 0."""
        if not (self.weight and self.size):
            return 0.0, 0.0
        spread = self.weight * self.size_squared - self.size**2
        proportional = (0.0, self.amount / self.size)
        if spread <= _SPREAD * self.size**2:
            return proportional
        slope = (self.weight * self.product - self.size * self.amount) / spread
        fixed = (self.amount - slope * self.size) / self.weight
        if slope < 0:
            return self.amount / self.weight, 0.0
        return (fixed, slope) if fixed >= 0 else proportional


@dataclass
class Speed:
    """How long the work of one bundle takes, learned from what was computed.

    Attributes:
        bundle: The bundle's name, for metrics.
        pace: Seconds of a run from its tokens.
        tokens: Tokens of a request from its characters.
    """

    bundle: str = ""
    pace: Pace = field(default_factory=Pace)
    tokens: Pace = field(default_factory=Pace)


_IDLE_SHARE = 0.5
"""Largest share of the request timeout that its computation may take on an idle server."""
_EARLIEST_SHARE = 0.25
"""Share of the time given to the earliest deadline while shorter requests are waiting."""
_AGEING = 0.05
"""Seconds by which a request counts as shorter for each second since its arrival."""
_MARGIN = 0.1
"""Share of the request timeout kept as a margin at admission: run times are estimates."""
_SHORT_QUEUE = 6
"""Longest wait under overload, in computations of a mean request. Fewer would leave the server idle
between arrivals."""
_LARGEST_COUNTED = 2
"""Largest share of a request in the wait under overload, in computations of a mean request."""
_NICENESS = 3
"""How much lower than the event loop's the priority of the computing thread is."""
_HOPELESS = 2.0
"""A request is dropped if it is expected to need this many times its remaining time."""


class Work(Protocol):
    """A request that is ready to be computed.

    Attributes:
        costs: Tokens of each run, in the order of `step`.
    """

    costs: list[int]

    def step(self) -> int:
        """Compute the next run, in the computing thread; return its tokens without padding."""

    def stop(self) -> None:
        """Abort the run being computed, if any; called in any thread."""


class Observer(Protocol):
    """Is notified of the scheduler's queue and runs, for metrics."""

    def queue_changed(self, in_flight: int, waiting: int) -> None:
        """The number of accepted requests, and of those whose first run has not started."""

    def run_finished(self, bundle: str, tokens: int, real_tokens: int, seconds: float) -> None:
        """A run of a bundle's graph has finished; `real_tokens` of its `tokens` are no padding."""


W = TypeVar("W", bound=Work)


@dataclass(eq=False)
class Job:
    """An accepted request.

    Attributes:
        deadline: Time on the event loop's clock.
        speed: The speed of its bundle.
        guess: Estimated tokens, used until the text is tokenized.
        done: Resolved when every run has finished.
        work: The work; None while the text is being tokenized.
        left: Tokens of each run that has not started.
        dropped: Whether the request is cancelled, late or refused.
        arrived: Time of admission, on the same clock as `deadline`.
        encoding: Seconds in `prepare`.
        computing: Seconds in runs.
        has_started: Whether a run has started.
    """

    deadline: float
    speed: Speed
    guess: int
    done: "asyncio.Future[None]"
    work: Work | None = None
    left: list[int] = field(default_factory=list)
    dropped: bool = False
    arrived: float = 0.0
    encoding: float = 0.0
    computing: float = 0.0
    has_started: bool = False


class Scheduler:
    """Admit, order and compute requests, on one event loop.

    Attributes:
        speed: The speed of work whose bundle has none of its own.
    """

    def __init__(self, limits: Limits, observer: Observer | None = None) -> None:
        self.speed = Speed()
        self._limits = limits
        self._observer = observer
        self._jobs: list[Job] = []
        self._running: Job | None = None
        self._run_ends = 0.0
        self._credit = 0.0
        self._seconds_each = Pace()
        self._sheds_until = -math.inf
        self._arrived = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="logratio-encode")
        self._computing = ThreadPoolExecutor(
            1, thread_name_prefix="logratio-compute", initializer=_yield_to_answers
        )

    @property
    def in_flight(self) -> int:
        """Number of accepted requests."""
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        """Number of accepted requests none of whose runs has started."""
        return sum(not job.has_started for job in self._jobs)

    @property
    def pace(self) -> Pace:
        """The pace of `speed`."""
        return self.speed.pace

    async def run(self, characters: int, prepare: Callable[[], W], speed: Speed | None = None) -> W:
        """Run `prepare`, compute the work it returns, and return that work.

        Work that is refused or late, or whose caller is cancelled, is dropped: its current run is
        aborted and no other starts. The times of the request are added to its record.

        Args:
            characters: Length of the request, to estimate its cost until `prepare` returns.
            prepare: Tokenizes the request; called in a separate thread.
            speed: The speed of the request's bundle; None: `Scheduler.speed`.

        Raises:
            RefusedError: 429 or 503 if the server is too busy to compute it in time, 413 if it is
                too large even for an idle server, 504 if its time is up.
        """
        job = self._admit(characters, speed or self.speed)
        try:
            async with asyncio.timeout_at(job.deadline):
                work = await self._encoded(job, prepare)
                if work.costs:  # a request without a valid candidate would lower the estimate
                    job.speed.tokens.learn(characters, sum(work.costs))
                self._begin(job, work)
                await job.done
                return work
        except TimeoutError:
            raise _late() from None
        finally:
            self._drop(job)
            self._record(job)

    def refuse_all(self) -> None:
        """Refuse every accepted request, because the server cannot finish it before its end."""
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(stopping())

    def close(self) -> None:
        """Drop all work and stop both threads."""
        for job in [*self._jobs]:
            self._drop(job)
        if self._driver is not None:
            self._driver.cancel()
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self._computing.shutdown(wait=False, cancel_futures=True)

    def check_open(self) -> None:
        """Refuse a request whatever it contains, so that nobody has to read it first.

        Raises:
            RefusedError: 429 if too many requests are waiting, 503 under lasting overload.
        """
        if len(self._jobs) >= self._limits.queue:
            self._shed()
            raise RefusedError(
                429, "queue_full", f"{self._limits.queue} requests are waiting; try again shortly"
            )
        excess = self._excess(self._jobs)
        if self._jobs and excess > 0:
            self._shed()
            raise _busy(excess)

    def _admit(self, characters: int, speed: Speed) -> Job:
        """Accept a request, or refuse it immediately."""
        self.check_open()
        loop = asyncio.get_running_loop()
        guess = math.ceil(speed.tokens.of(characters))
        now = loop.time()
        job = Job(now + self._limits.seconds, speed, guess, loop.create_future(), arrived=now)
        if self._jobs:  # on an idle server, do not refuse because of an estimate
            self._check_wait(job)
        self._jobs.append(job)
        self._notify()
        return job

    def _notify(self) -> None:
        if self._observer is not None:
            self._observer.queue_changed(self.in_flight, self.waiting)

    def _record(self, job: Job) -> None:
        total = self._now() - job.arrived
        current_record().add_seconds(
            queue=max(0.0, total - job.encoding - job.computing),
            encode=job.encoding,
            compute=job.computing,
        )

    async def _encoded(self, job: Job, prepare: Callable[[], W]) -> W:
        def unless_dropped() -> W:
            if job.dropped:
                raise _late()
            start = time.perf_counter()
            try:
                return prepare()
            finally:
                job.encoding = time.perf_counter() - start

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoding, unless_dropped)

    def _begin(self, job: Job, work: Work) -> None:
        """Queue work now that its cost is known, or refuse it."""
        job.work, job.left = work, [*work.costs]
        if job.done.done():  # refused meanwhile
            return
        if not job.left:
            job.done.set_result(None)
            return
        self._check_size(job)
        self._seconds_each.learn(1, self._needed(job))
        self._check_wait(job)
        if self._driver is None:
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        self._arrived.set()

    def _check_size(self, job: Job) -> None:
        """Refuse a request that is too large even for an idle server."""
        tokens, limit = sum(job.left), self._limits.request_tokens
        if tokens > limit:
            raise RefusedError(
                413, "too_many_tokens",
                f"the request needs {tokens:,} tokens of computation (the query is recomputed for "
                f"every few documents), above the limit of {limit:,} (--max-request-tokens): send "
                "fewer or shorter documents",
            )  # fmt: skip
        needed = self._needed(job)
        if needed > self._limits.seconds * _IDLE_SHARE:
            raise RefusedError(
                413, "too_slow",
                f"the request would take about {needed:,.0f} s, more than half of the "
                f"{self._limits.seconds:g} s of --request-seconds: send fewer or shorter documents",
            )  # fmt: skip

    def _check_wait(self, job: Job) -> None:
        """Refuse a request that would wait too long, or make any request miss its deadline.

        Raises:
            RefusedError: 503, with the seconds to wait before a retry.
        """
        others = [other for other in self._jobs if other is not job]
        late = self._wait(job, others) - self._limits.queue_seconds
        if late > 0:
            self._shed()
        overrun = self._overrun([*others, job], self._busy()) + _MARGIN * self._limits.seconds
        excess = max(late, overrun)
        if excess > 0:
            raise _busy(excess)

    def _shed(self) -> None:
        """Keep the queue short until no request has been refused for a while."""
        self._sheds_until = self._now() + self._limits.queue_seconds

    def _excess(self, jobs: Sequence[Job]) -> float:
        """Return by how many seconds accepted work exceeds what a lasting overload allows.

        -∞ if the server is not overloaded.

        If requests keep arriving faster than they are computed, a long queue answers no more of
        them than a short one, only later. All waiting requests count, also the larger ones which a
        new one would overtake: otherwise these would wait until the load ends. A very large one
        counts only in part, so that others are accepted while it is computed.
        """
        if self._now() >= self._sheds_until:
            return -math.inf
        mean = self._seconds_each.of(1)
        needs = (min(self._needed(job), _LARGEST_COUNTED * mean) for job in jobs)
        return self._busy() + sum(needs) - _SHORT_QUEUE * mean

    def _wait(self, job: Job, others: Sequence[Job]) -> float:
        """Return the seconds that other requests would delay this request's last run."""
        needed = self._needed(job)
        first = sum(self._needed(other) for other in others if self._rank(other) <= needed)
        behind = sum(map(self._needed, others)) - first
        turns = (first + needed) * _EARLIEST_SHARE / (1 - _EARLIEST_SHARE)
        return self._busy() + first + min(behind, turns)

    def _overrun(self, jobs: Sequence[Job], delay: float) -> float:
        """Return the largest lateness in seconds with the earliest deadline first; below 0: none.

        That order minimises the largest lateness (Jackson's rule).
        """
        end, worst = self._now() + delay, -math.inf
        for job in sorted(jobs, key=_by_deadline):
            end += self._needed(job)
            worst = max(worst, end - job.deadline)
        return worst

    def _needed(self, job: Job) -> float:
        """Return the expected seconds of a job's runs that have not started."""
        if job.work is None:
            runs = math.ceil(job.guess / self._limits.run_tokens)
            return job.speed.pace.of(job.guess, runs)
        return job.speed.pace.of(sum(job.left), len(job.left))

    def _rank(self, job: Job) -> float:
        """Return the expected seconds of a job, less a part of those since its arrival.

        The lowest is computed first, so that short requests overtake longer ones, but not forever.
        """
        return self._needed(job) - _AGEING * (self._now() - job.arrived)

    def _busy(self) -> float:
        """Return the expected remaining seconds of the current run.

        An overdue run is expected to take as long again as it is overdue.
        """
        return abs(self._run_ends - self._now()) if self._running else 0.0

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _drop(self, job: Job) -> None:
        """Remove a job, and abort its current run."""
        job.dropped = True
        if job in self._jobs:
            self._jobs.remove(job)
            self._notify()
        if job is self._running and job.work is not None:
            job.work.stop()
        if not job.done.cancel() and not job.done.cancelled():
            job.done.exception()  # otherwise asyncio logs an unretrieved exception

    async def _drive(self) -> None:
        """Compute one run after another, until cancelled."""
        while True:
            job = self._choose()
            if job is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                await self._compute(job)

    def _choose(self) -> Job | None:
        """Return the job to compute next; fail those that cannot meet their deadline."""
        ready = [job for job in self._jobs if job.left and not job.done.done()]
        for job in [*ready]:
            if self._now() + self._needed(job) / _HOPELESS > job.deadline:
                job.done.set_exception(_late())
                ready.remove(job)
        if not ready:
            return None
        shortest = min(ready, key=lambda job: (self._rank(job), job.deadline))
        earliest = min(ready, key=_by_deadline)
        run = shortest.speed.pace.of(shortest.left[0])
        if shortest is earliest:
            self._credit = 0.0
        elif self._credit >= earliest.speed.pace.of(earliest.left[0]) or self._causes_a_miss(
            shortest, ready, run
        ):
            self._credit = 0.0
            return earliest
        else:
            self._credit += run * _EARLIEST_SHARE / (1 - _EARLIEST_SHARE)
        return shortest

    def _causes_a_miss(self, chosen: Job, ready: Sequence[Job], run: float) -> bool:
        """Return whether running `chosen` now makes another miss a deadline it could meet."""
        others = [job for job in ready if job is not chosen]
        return self._overrun(others, run) > 0 >= self._overrun(others, 0)

    async def _compute(self, job: Job) -> None:
        """Compute one run, and update the pace with its time."""
        assert job.work is not None
        tokens = job.left.pop(0)
        self._running, self._run_ends = job, self._now() + job.speed.pace.of(tokens)
        job.has_started = True
        self._notify()
        try:
            loop = asyncio.get_running_loop()
            real, seconds = await loop.run_in_executor(self._computing, _timed, job.work.step)
        except Exception as error:  # any error fails only this request
            if not job.done.done():
                job.done.set_exception(error)
        else:
            job.speed.pace.learn(tokens, seconds)
            job.computing += seconds
            if self._observer is not None:
                self._observer.run_finished(job.speed.bundle, tokens, real, seconds)
            if not job.left and not job.done.done():
                job.done.set_result(None)
        finally:
            self._running = None


def _yield_to_answers() -> None:
    """Let the event loop, which reads and refuses requests, run before this thread's computation.

    They may have only one core, where a refusal would wait for several time slices of a run. Linux
    gives each thread a priority of its own; containers and services are weighed against each other
    as groups, whatever the priorities in them.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):  # some sandboxes allow neither
            lowered = min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
            os.setpriority(os.PRIO_PROCESS, thread, lowered)


def _timed(step: Callable[[], int]) -> tuple[int, float]:
    start = time.perf_counter()
    return step(), time.perf_counter() - start


def _by_deadline(job: Job) -> float:
    return job.deadline


def _busy(seconds: float) -> RefusedError:
    return RefusedError(
        503, "busy",
        "the server is too busy to answer in time; retry after the seconds in Retry-After",
        retry_after=math.ceil(seconds),
    )  # fmt: skip


def _late() -> RefusedError:
    return RefusedError(504, "deadline", "the request timed out")
