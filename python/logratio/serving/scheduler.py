"""Who computes next, and who is refused: one thread that computes, run by run of the graph."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from logratio.serving.limits import Limits, RefusedError

_MEMORY = 64
"""Pieces of work that the estimate remembers, roughly: an older one weighs 1/e."""
_SPREAD = 1e-3
"""Of the sizes, below which a line through them would be guessed."""


@dataclass
class Pace:
    """A line through recent work: so much for each piece, and so much for each unit of its size.

    Sums of the weights, sizes, amounts and their products; an older piece weighs less.
    """

    weight: float = 0.0
    size: float = 0.0
    amount: float = 0.0
    size_squared: float = 0.0
    product: float = 0.0

    def learn(self, size: float, amount: float) -> None:
        """Take in a piece of work that has ended."""
        new = (1.0, size, amount, size * size, size * amount)
        keep = 1 - 1 / _MEMORY
        for name, value in zip(self.__dataclass_fields__, new, strict=True):
            setattr(self, name, getattr(self, name) * keep + value)

    def of(self, size: float, pieces: int = 1) -> float:
        """Return what work of this size is expected to take, cut into `pieces`; 0: nobody knows."""
        fixed, slope = self._line()
        return fixed * pieces + slope * size

    def _line(self) -> tuple[float, float]:
        """Return what a piece takes whatever its size, and what each unit adds; none below 0."""
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


_OWN_SHARE = 0.5
"""Of a request's time, the most that computing it may take on an idle server."""
_ELDERS_SHARE = 0.25
"""Of all time, what goes to the earliest deadline while shorter requests wait."""
_MARGIN = 0.1
"""Of a request's time, what is kept free when it is accepted: run times are estimates."""
_HOPELESS = 2.0
"""Work is given up if it is expected to need this many times what is left of its time."""


class Work(Protocol):
    """A request that is ready to be computed.

    Attributes:
        costs: Tokens of each run, in the order of `step`.
    """

    costs: list[int]

    def step(self) -> None:
        """Compute the next run; called in the computing thread."""

    def stop(self) -> None:
        """End the run that is being computed, if there is one; called in any thread."""


W = TypeVar("W", bound=Work)


@dataclass(eq=False)
class Job:
    """A request that was accepted.

    Attributes:
        deadline: On the event loop's clock.
        guess: Tokens expected before its text is encoded.
        done: Resolved when every run has ended.
        work: None while its text is being encoded.
        left: Tokens of each run that has not begun.
    """

    deadline: float
    guess: int
    done: "asyncio.Future[None]"
    work: Work | None = None
    left: list[int] = field(default_factory=list)
    dropped: bool = False


class Scheduler:
    """Accepts, orders and computes requests. Lives on one event loop.

    Attributes:
        pace: Seconds of a run by its tokens.
    """

    def __init__(self, limits: Limits) -> None:
        self.pace = Pace()
        self._limits = limits
        self._jobs: list[Job] = []
        self._running: Job | None = None
        self._run_ends = 0.0
        self._credit = 0.0
        self._tokens_per_character = Pace()
        self._arrived = asyncio.Event()
        self._driver: asyncio.Task[None] | None = None
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="logratio-encode")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="logratio-compute")

    async def run(self, characters: int, prepare: Callable[[], W]) -> W:
        """Return the work that `prepare` makes, computed.

        Args:
            characters: Of the request, by which its cost is guessed until `prepare` has ended.
            prepare: Called in a separate thread.

        Raises:
            RefusedError: 429 or 503 where it cannot be computed in time, 413 where it never
                could, 504 when time is up all the same. Work that is refused or late, or whose
                caller was cancelled, is dropped: the run that is being computed is its last.
        """
        job = self._admit(characters)
        try:
            async with asyncio.timeout_at(job.deadline):
                work = await self._encoded(job, prepare)
                self._tokens_per_character.learn(characters, sum(work.costs))
                self._begin(job, work)
                await job.done
                return work
        except TimeoutError:
            raise _late() from None
        finally:
            self._drop(job)

    def close(self) -> None:
        """Drop all work and end both threads."""
        for job in [*self._jobs]:
            self._drop(job)
        if self._driver is not None:
            self._driver.cancel()
        self._encoding.shutdown(wait=False, cancel_futures=True)
        self._computing.shutdown(wait=False, cancel_futures=True)

    def _admit(self, characters: int) -> Job:
        """Accept a request, or refuse it at once."""
        loop = asyncio.get_running_loop()
        if len(self._jobs) >= self._limits.queue:
            raise RefusedError(
                429, "queue_full", f"{self._limits.queue} requests are waiting; try again shortly"
            )
        guess = math.ceil(self._tokens_per_character.of(characters))
        job = Job(loop.time() + self._limits.seconds, guess, loop.create_future())
        if self._jobs:  # a guess is no reason to refuse what has the server to itself
            self._check_wait(job)
        self._jobs.append(job)
        return job

    async def _encoded(self, job: Job, prepare: Callable[[], W]) -> W:
        def unless_dropped() -> W:
            if job.dropped:
                raise _late()
            return prepare()

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoding, unless_dropped)

    def _begin(self, job: Job, work: Work) -> None:
        """Queue work whose cost is now known, or refuse it."""
        job.work, job.left = work, [*work.costs]
        if not job.left:
            job.done.set_result(None)
            return
        self._check_size(job)
        self._check_wait(job)
        if self._driver is None:
            self._driver = asyncio.get_running_loop().create_task(self._drive())
        self._arrived.set()

    def _check_size(self, job: Job) -> None:
        """Refuse what would be too much for an idle server."""
        tokens, limit = sum(job.left), self._limits.request_tokens
        if tokens > limit:
            raise RefusedError(
                413, "too_many_tokens",
                f"the request takes {tokens:,} tokens of computation (the query is computed again "
                f"for every few documents), and the limit is {limit:,} (--max-request-tokens): "
                "send fewer or shorter documents",
            )  # fmt: skip
        needed = self._needed(job)
        if needed > self._limits.seconds * _OWN_SHARE:
            raise RefusedError(
                413, "too_slow",
                f"the request would take about {needed:,.0f} s here, and may take half of "
                f"{self._limits.seconds:g} s (--request-seconds): send fewer or shorter documents",
            )  # fmt: skip

    def _check_wait(self, job: Job) -> None:
        """Refuse what would wait for too long, or make any accepted request miss its deadline.

        Raises:
            RefusedError: 503, with the seconds after which it would be accepted.
        """
        others = [other for other in self._jobs if other is not job]
        excess = max(
            self._wait(job, others) - self._limits.queue_seconds,
            self._overrun([*others, job], self._busy()) + _MARGIN * self._limits.seconds,
        )
        if excess > 0:
            raise RefusedError(
                503, "busy",
                "the server has more to compute than it can answer in time; try again after the "
                "seconds in Retry-After",
                retry_after=math.ceil(excess),
            )  # fmt: skip

    def _wait(self, job: Job, others: Sequence[Job]) -> float:
        """Return the seconds until a request's last run would begin, without its own."""
        own = self._needed(job)
        needs = [self._needed(other) for other in others]
        first = sum(need for need in needs if need <= own)
        behind = sum(needs) - first
        turns = (first + own) * _ELDERS_SHARE / (1 - _ELDERS_SHARE)
        return self._busy() + first + min(behind, turns)

    def _overrun(self, jobs: Sequence[Job], delay: float) -> float:
        """Return by how many seconds the worst deadline is missed, the earliest served first.

        No order of service does better; below 0: none is missed.
        """
        end, worst = self._now() + delay, -math.inf
        for job in sorted(jobs, key=_by_deadline):
            end += self._needed(job)
            worst = max(worst, end - job.deadline)
        return worst

    def _needed(self, job: Job) -> float:
        """Return the seconds that the runs of a job which have not begun are expected to take."""
        if job.work is None:
            runs = math.ceil(job.guess / self._limits.run_tokens)
            return self.pace.of(job.guess, runs)
        return self.pace.of(sum(job.left), len(job.left))

    def _busy(self) -> float:
        """Return the seconds for which the run that is being computed is expected to go on.

        One that is overdue is expected to take as long again as it is late.
        """
        return abs(self._run_ends - self._now()) if self._running else 0.0

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _drop(self, job: Job) -> None:
        """Forget a job; its run, if one is being computed, is ended."""
        job.dropped = True
        if job in self._jobs:
            self._jobs.remove(job)
        if job is self._running and job.work is not None:
            job.work.stop()
        if not job.done.cancel() and not job.done.cancelled():
            job.done.exception()  # or asyncio logs that nobody has looked at it

    async def _drive(self) -> None:
        """Compute run after run, for ever."""
        while True:
            job = self._choose()
            if job is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                await self._compute(job)

    def _choose(self) -> Job | None:
        """Return the job whose next run is computed next; give up what is hopeless."""
        ready = [job for job in self._jobs if job.left and not job.done.done()]
        for job in [*ready]:
            if self._now() + self._needed(job) / _HOPELESS > job.deadline:
                job.done.set_exception(_late())
                ready.remove(job)
        if not ready:
            return None
        shortest = min(ready, key=lambda job: (self._needed(job), job.deadline))
        elder = min(ready, key=_by_deadline)
        run = self.pace.of(shortest.left[0])
        if shortest is elder:
            self._credit = 0.0
        elif self._credit >= self.pace.of(elder.left[0]) or self._squeezes(shortest, ready, run):
            self._credit = 0.0
            return elder
        else:
            self._credit += run * _ELDERS_SHARE / (1 - _ELDERS_SHARE)
        return shortest

    def _squeezes(self, chosen: Job, ready: Sequence[Job], run: float) -> bool:
        """Tell whether a run of `chosen` now makes another miss a deadline that can be met."""
        others = [job for job in ready if job is not chosen]
        return self._overrun(others, run) > 0 >= self._overrun(others, 0)

    async def _compute(self, job: Job) -> None:
        """Compute one run and learn from it."""
        assert job.work is not None
        tokens = job.left.pop(0)
        self._running, self._run_ends = job, self._now() + self.pace.of(tokens)
        try:
            loop = asyncio.get_running_loop()
            seconds = await loop.run_in_executor(self._computing, _timed, job.work.step)
        except Exception as error:  # whatever it is, it is that request's alone
            if not job.done.done():
                job.done.set_exception(error)
        else:
            self.pace.learn(tokens, seconds)
            if not job.left and not job.done.done():
                job.done.set_result(None)
        finally:
            self._running = None


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _by_deadline(job: Job) -> float:
    return job.deadline


def _late() -> RefusedError:
    return RefusedError(504, "deadline", "the time for this request is up")
