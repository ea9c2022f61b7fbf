"""The scheduler under lasting load, in virtual time: what it answers, and how late."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from virtual_time import VirtualLoop, in_virtual_time

from logratio.serving import scheduler as module
from logratio.serving.limits import Limits, RefusedError
from logratio.serving.scheduler import Scheduler

SECONDS_PER_TOKEN, SECONDS_PER_RUN = 1e-3, 2e-3
SMALLEST, LARGEST = 32, 168
MEAN = (SMALLEST + LARGEST) / 2 * SECONDS_PER_TOKEN + SECONDS_PER_RUN
"""Seconds of a mean request, so that the capacity is 1 / MEAN requests per second."""
VERY_LARGE = [198] * 50


@dataclass
class Computation:
    """Work of some runs."""

    costs: list[int]
    done: int = 0

    @property
    def seconds(self) -> float:
        return sum(map(seconds_of_run, self.costs))

    def step(self) -> int:
        self.done += 1
        return self.costs[self.done - 1]

    def stop(self) -> None:
        pass


def seconds_of_run(tokens: int) -> float:
    return tokens * SECONDS_PER_TOKEN + SECONDS_PER_RUN


@dataclass(frozen=True)
class Answered:
    """A request: when it arrived, how long it took, its status and its own seconds."""

    at: float
    took: float
    status: int
    seconds: float


def length(step: Any) -> float:
    work: Computation = step.__self__
    return seconds_of_run(work.costs[work.done])


def timed(step: Any) -> tuple[int, float]:
    seconds = length(step)
    return step(), seconds


@pytest.fixture(autouse=True)
def virtual_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_timed", timed)


def simulate(
    times: Sequence[float], seed: int = 0, very_large: Sequence[float] = (), **limits: Any
) -> list[Answered]:
    """Let requests of random sizes arrive at `times`.

    Args:
        times: When they arrive.
        seed: Of their sizes.
        very_large: When requests arrive that take 10 s in 50 runs. They are sent again until they
            are accepted. Their answers are the last ones.
        limits: Of the server.
    """
    sizes = np.random.default_rng(seed).integers(SMALLEST, LARGEST + 1, size=len(times)).tolist()

    async def main(loop: VirtualLoop) -> list[Answered]:
        loop.lasts = lambda func, *given: length(*given) if func is timed else 0.0
        scheduler = Scheduler(Limits(**limits))
        for tokens in (SMALLEST, LARGEST):
            scheduler.pace.learn(tokens, seconds_of_run(tokens))

        async def one(at: float, costs: list[int]) -> Answered:
            await asyncio.sleep(at - loop.time())
            work, status = Computation(costs), 200
            try:
                await scheduler.run(4 * sum(costs), lambda: work)
            except RefusedError as error:
                status = error.status
            return Answered(at, loop.time() - at, status, work.seconds)

        async def insisted(at: float) -> Answered:
            while (found := await one(at, VERY_LARGE)).status != 200:
                at = loop.time() + 0.1
            return found

        work = [one(at, [size]) for at, size in zip(times, sizes, strict=True)]
        found = await asyncio.gather(*work, *map(insisted, very_large))
        scheduler.close()
        return list(found)

    return in_virtual_time(main)


def at_share(share: float, seconds: float, begin: float = 0.0) -> list[float]:
    """Poisson arrivals at a share of the capacity."""
    gaps = np.random.default_rng(1).exponential(MEAN / share, size=int(share * seconds / MEAN))
    return [float(at) for at in begin + gaps.cumsum()]


def p99(answers: Sequence[Answered]) -> float:
    return float(np.percentile([one.took for one in answers if one.status == 200], 99))


def test_overload_costs_neither_throughput_nor_the_latency_of_what_is_accepted() -> None:
    seconds, settled = 50.0, 15.0
    below = simulate(at_share(0.8, seconds))
    assert {one.status for one in below} == {200}
    for share in (2.0, 3.0):
        answers = [one for one in simulate(at_share(share, seconds)) if one.at >= settled]
        computed = sum(one.seconds for one in answers if one.status == 200)
        assert computed >= 0.95 * (seconds - settled)
        assert p99(answers) <= 2 * p99(below)
        refused = [one for one in answers if one.status != 200]
        assert {one.status for one in refused} <= {429, 503}
        assert max(one.took for one in refused) < 0.01


def test_at_capacity_the_large_do_not_wait_for_all_the_small() -> None:
    answers = [one for one in simulate(at_share(1.2, 100.0)) if one.at >= 15]
    assert {one.status for one in answers} <= {200, 503}
    computed = sum(one.seconds for one in answers if one.status == 200)
    assert computed >= 0.95 * 85
    assert max(one.took for one in answers) < 1.5 * Limits().queue_seconds


def test_a_very_large_request_does_not_keep_out_the_others_under_overload() -> None:
    *answers, very_large = simulate(at_share(2.0, 60.0), very_large=[20.0])
    end = very_large.at + very_large.took
    others = [one for one in answers if very_large.at < one.at < end]
    assert sum(one.status == 200 for one in others) > 0.2 * len(others)
    assert p99(others) < 3.0


@pytest.mark.parametrize("queue", [256, 20])
def test_a_burst_may_wait_longer_than_requests_of_a_lasting_overload(queue: int) -> None:
    burst = [0.0] * 15  # 1.5 s of work
    assert {one.status for one in simulate(burst, queue=queue)} == {200}
    overload = at_share(3.0, 40.0)
    late = simulate([*overload, *(41 + at for at in burst)], queue=queue)[len(overload) :]
    assert {one.status for one in late} == {200, 503}
    # Some seconds after the last refusal a burst is accepted again.
    later = simulate([*overload, *(60 + at for at in burst)], queue=queue)[len(overload) :]
    assert {one.status for one in later} == {200}


def test_requests_of_every_size_are_accepted_under_overload() -> None:
    answers = [one for one in simulate(at_share(2.0, 100.0)) if one.at > 30]
    large = [one for one in answers if one.seconds > 1.4 * MEAN]
    assert sum(one.status == 200 for one in large) > 0.1 * len(large)
