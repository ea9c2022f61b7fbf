"""The scheduler: order of requests, refusal at admission, and dropped work."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from logratio.serving.limits import Limits, RefusedError
from logratio.serving.scheduler import Pace, Scheduler

SECONDS_PER_TOKEN = 1e-4


@dataclass
class Fake:
    """Work of known cost, which logs its runs."""

    name: str
    costs: list[int]
    log: list[str]
    stopped: threading.Event = field(default_factory=threading.Event)
    steps: int = 0

    def step(self) -> int:
        self.log.append(self.name)
        if self.stopped.wait(self.costs[self.steps] * SECONDS_PER_TOKEN):
            raise RuntimeError("stopped")
        self.steps += 1
        return self.costs[self.steps - 1]

    def stop(self) -> None:
        self.stopped.set()


def run(act: Callable[[Scheduler, list[str]], Awaitable[Any]], **limits: Any) -> list[str]:
    """Let `act` use a scheduler with a known pace; return the computed runs in order."""
    log: list[str] = []

    async def main() -> None:
        scheduler = Scheduler(Limits(**limits))
        for tokens in (100, 1000):
            scheduler.pace.learn(tokens, tokens * SECONDS_PER_TOKEN)
        try:
            await act(scheduler, log)
        finally:
            scheduler.close()

    asyncio.run(main())
    return log


async def begun(log: list[str], name: str) -> None:
    while name not in log:
        await asyncio.sleep(0.002)


def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    async def act(scheduler: Scheduler, log: list[str]) -> None:
        large = asyncio.create_task(scheduler.run(10, lambda: Fake("large", [500] * 10, log)))
        await begun(log, "large")
        small = asyncio.create_task(scheduler.run(1, lambda: Fake("small", [50], log)))
        await small
        assert not large.done()
        await large

    log = run(act)
    assert log.count("large") == 10
    assert log.index("small") <= 2


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    async def act(scheduler: Scheduler, log: list[str]) -> None:
        large = asyncio.create_task(scheduler.run(10, lambda: Fake("large", [100] * 4, log)))
        await begun(log, "large")

        async def small() -> None:
            for _ in range(20):
                await scheduler.run(1, lambda: Fake("small", [100], log))

        small_ones = [asyncio.create_task(small()) for _ in range(2)]
        await large
        assert not all(task.done() for task in small_ones)
        await asyncio.gather(*small_ones)

    run(act, seconds=30.0)


def test_work_of_a_disconnected_client_stops_in_its_current_run() -> None:
    async def act(scheduler: Scheduler, log: list[str]) -> None:
        left = asyncio.create_task(scheduler.run(10, lambda: Fake("left", [20000] * 5, log)))
        await begun(log, "left")
        left.cancel()
        start = time.perf_counter()
        await scheduler.run(1, lambda: Fake("next", [10], log))
        assert time.perf_counter() - start < 1.5  # not the rest of a run of two seconds

    assert run(act) == ["left", "next"]


def test_a_request_that_would_be_late_is_refused_with_a_retry_time() -> None:
    async def act(scheduler: Scheduler, log: list[str]) -> None:
        tasks = []
        refused = 0
        for number in range(12):  # 0.2 s each, and 1 s until each deadline
            work = Fake(str(number), [500] * 4, log)
            tasks.append(asyncio.create_task(scheduler.run(20, lambda work=work: work)))  # type: ignore[misc]
            await asyncio.sleep(0.01)
        for task in tasks:
            try:
                await task
            except RefusedError as error:
                refused += 1
                assert (error.status, error.code) == (503, "busy")
                assert error.retry_after >= 1
        assert 3 <= 12 - refused <= 6  # nearly as many as fit into the time
        # Every request that was started was also answered.
        assert len(log) == 4 * (12 - refused)

    run(act, seconds=1.0)


def test_overload_leaves_throughput_near_capacity() -> None:
    """At three times the capacity: computing requests that expire would answer hardly any."""
    answered, late, offered, each = 0, 0, 60, 250

    async def act(scheduler: Scheduler, log: list[str]) -> None:
        nonlocal answered

        async def one(number: int) -> bool:
            nonlocal late
            await asyncio.sleep(number * each * SECONDS_PER_TOKEN / 3)
            try:
                await scheduler.run(20, lambda: Fake(str(number), [each], log))
            except RefusedError as error:
                late += error.status == 504  # a short stall of the machine makes a few late
                assert error.status in (429, 503, 504)
                return False
            return True

        answered = sum(await asyncio.gather(*map(one, range(offered))))

    start = time.perf_counter()
    log = run(act, seconds=0.5)
    took = time.perf_counter() - start
    assert len(log) <= answered + late  # no other request was computed
    assert late <= 0.1 * offered
    assert answered * each * SECONDS_PER_TOKEN > 0.3 * took


def test_a_request_that_is_too_large_is_refused_with_the_flag() -> None:
    async def act(scheduler: Scheduler, log: list[str]) -> None:
        with pytest.raises(RefusedError, match="max_request_tokens") as error:
            await scheduler.run(10, lambda: Fake("big", [600, 600], log))
        assert error.value.status == 413
        with pytest.raises(RefusedError, match="request_seconds") as error:
            await scheduler.run(10, lambda: Fake("slow", [900], log))
        assert error.value.status == 413

    assert run(act, request_tokens=1000, seconds=0.15) == []


def test_an_error_fails_only_its_request() -> None:
    async def act(scheduler: Scheduler, log: list[str]) -> None:
        broken = Fake("broken", [10], log)
        broken.stop()
        with pytest.raises(RuntimeError, match="stopped"):
            await scheduler.run(1, lambda: broken)
        await scheduler.run(1, lambda: Fake("next", [10], log))

    assert run(act) == ["broken", "next"]


def test_the_pace_learns_the_cost_per_run_and_per_token() -> None:
    pace = Pace()
    assert pace.of(1000) == 0
    for tokens in (100, 500, 1000, 100, 700):
        pace.learn(tokens, 0.01 + tokens * 1e-3)
    assert pace.of(2000) == pytest.approx(2.01)
    assert pace.of(2000, 4) == pytest.approx(2.04)
    for _ in range(500):
        pace.learn(500, 5.0)  # the machine has become slower
    assert pace.of(500) == pytest.approx(5.0, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_requests_are_read_and_refused_before_others_are_computed() -> None:
    found: list[int] = []

    class Observed(Fake):
        def step(self) -> int:
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return super().step()

    async def act(scheduler: Scheduler, log: list[str]) -> None:
        await scheduler.run(1, lambda: Observed("one", [10], log))

    run(act)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert own < 19, "started with the lowest priority, which hides the difference"
    assert found[0] > own
