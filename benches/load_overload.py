"""Scenarios of bench_load.py about load: overload, a large request among small ones, scores."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from load_client import Client, Outcome, Request, arrivals, closed_loop, open_loop
from load_figures import Record, Row, answered, figures, percentiles
from load_material import BUNDLE, Texts, small_requests
from load_server import Server, running, serve_command

RATES = (0.8, 1.0, 2.0, 3.0)
"""Shares of the capacity."""
_AT_ONCE = 4
"""Requests in flight while capacity is measured: enough that one always waits."""
_SETTLING_SECONDS = 15.0
"""Time at the start of an overload that its figures leave out. The server accepts it as a burst
until requests would wait for 5 s, and takes as long again to shorten that queue."""
_OVERLOAD_SECONDS = 30.0
"""Least length of an overload."""
_SMALL_SHARE = 0.3
"""Load by small requests, as a share of the capacity, while a large one is computed."""
_LARGE = (64, 256, 16)
"""Tokens of the prompt, candidates, and tokens of each."""


def capacity(port: int, requests: Sequence[Request], seconds: float) -> float:
    """Return the requests per second with a few in flight at all times."""

    async def measured() -> list[Outcome]:
        client = Client(port)
        await closed_loop(client, lambda n: requests[n % len(requests)], at_once=2, most=20)
        try:
            return await closed_loop(
                client, lambda n: requests[n % len(requests)], at_once=_AT_ONCE, seconds=seconds
            )
        finally:
            client.close()

    outcomes = asyncio.run(measured())
    if len(answered(outcomes)) < len(outcomes):
        raise RuntimeError("requests failed while the capacity was measured")
    return len(outcomes) / max(one.ended for one in outcomes)


def load(
    port: int, requests: Sequence[Request], rate: float, seconds: float, seed: int
) -> list[Outcome]:
    """Send requests at Poisson times, on an open loop."""
    plan = [
        (at, requests[number % len(requests)])
        for number, at in enumerate(arrivals(rate, seconds, seed))
    ]

    async def sent() -> list[Outcome]:
        client = Client(port)
        try:
            return await open_loop(client, plan)
        finally:
            client.close()

    return asyncio.run(sent())


def overload(folder: Path, logs: Path, record: Record, seconds: float, shape: str) -> None:
    """Load a server below, at and above its capacity, which is measured before and after each load.

    On a shared host it differs between minutes more than the server's answers do.
    """
    seconds = max(seconds, _OVERLOAD_SECONDS)
    texts = Texts.of(folder / BUNDLE)
    requests = small_requests(texts, 2000)
    with running(serve_command(folder / BUNDLE), logs / "overload.log") as server:
        before = capacity(server.port, requests, seconds / 5)
        for number, share in enumerate(RATES):
            outcomes = load(server.port, requests, share * before, seconds, seed=number)
            after = capacity(server.port, requests, seconds / 5)
            row = {"shape": shape, "share": share, "capacity": round((before + after) / 2, 3)}
            row |= {"before": round(before, 3), "after": round(after, 3)}
            row |= {"rate": round(share * before, 3), "seconds": seconds}
            row |= {"resident": server.resident_bytes()}
            record.add("overload", row | figures(outcomes, seconds, _SETTLING_SECONDS))
            before = after


def mixed(folder: Path, logs: Path, record: Record, seconds: float, shape: str) -> None:
    """Send small requests alone, then while one large request after another is computed."""
    texts = Texts.of(folder / BUNDLE)
    requests = small_requests(texts, 2000)
    random = np.random.default_rng(5)
    large = [texts.request(random, "large", *_LARGE) for _ in range(50)]
    with running(serve_command(folder / BUNDLE), logs / "mixed.log") as server:
        rate = _SMALL_SHARE * capacity(server.port, requests, seconds / 4)
        quiet = figures(load(server.port, requests, rate, seconds, 1), seconds)
        record.add(
            "mixed", {"shape": shape, "large": False, "rate": rate, "seconds": seconds} | quiet
        )
        small, big = _beside_large(server, requests, large, rate, seconds)
        row = {"shape": shape, "large": True, "rate": rate, "seconds": seconds}
        row |= {"large_ms": percentiles([one.latency for one in answered(big)])}
        record.add("mixed", row | figures(small, seconds))


def _beside_large(
    server: Server, requests: Sequence[Request], large: list[Request], rate: float, seconds: float
) -> tuple[list[Outcome], list[Outcome]]:
    plan = [(at, requests[n % len(requests)]) for n, at in enumerate(arrivals(rate, seconds, 1))]

    async def both() -> tuple[list[Outcome], list[Outcome]]:
        client, other = Client(server.port), Client(server.port, "large")
        small, big = await asyncio.gather(
            open_loop(client, plan),
            closed_loop(other, lambda n: large[n % len(large)], at_once=1, seconds=seconds),
        )
        client.close()
        other.close()
        return small, big

    return asyncio.run(both())


def same_scores(folder: Path, logs: Path, record: Record, seconds: float, shape: str) -> None:
    """Score requests alone, in one batch, and under twice the capacity."""
    texts = Texts.of(folder / BUNDLE)
    others = small_requests(texts, 2000)
    random = np.random.default_rng(6)
    bodies = [texts.body(random, int(random.integers(16, 65)), 8, 16) for _ in range(25)]
    single = [Request("checked", json.dumps(body).encode()) for body in bodies]
    with running(serve_command(folder / BUNDLE), logs / "scores.log") as server:
        rate = 2 * capacity(server.port, others, min(seconds / 4, 10))
        alone = asyncio.run(_one_by_one(server.port, single))
        batched = asyncio.run(_in_a_batch(server.port, bodies))
        busy = asyncio.run(_under_load(server.port, single, others, rate, seconds))
    for name, found in (("batch", batched), ("load", busy)):
        pairs = [(one, other) for one, other in zip(alone, found, strict=True) if other]
        worst = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
        changes = sum(_order(one) != _order(other) for one, other in pairs)
        row = {"shape": shape, "against": name, "requests": len(pairs), "asked": len(found)}
        record.add("same-scores", row | {"largest_difference": worst, "order_changes": changes})


def _order(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def _scores(answer: bytes) -> list[float]:
    results = json.loads(answer)["results"]
    return [one["relevance_score"] for one in sorted(results, key=lambda one: one["index"])]


async def _one_by_one(port: int, requests: Sequence[Request]) -> list[list[float]]:
    client, found = Client(port), list[list[float]]()
    for number, request in enumerate(requests):
        status, answer = await client.post(request, number)
        if status != 200:
            raise RuntimeError(f"a request to an idle server was answered with {status}")
        found.append(_scores(answer))
    client.close()
    return found


async def _in_a_batch(port: int, bodies: Sequence[Row]) -> list[list[float]]:
    groups = [{"prompt": one["query"], "candidates": one["documents"]} for one in bodies]
    client = Client(port)
    body = json.dumps({"groups": groups}).encode()
    status, answer = await client.post(Request("batch", body, "/v1/score"), 0)
    client.close()
    if status != 200:
        raise RuntimeError(f"the batch was answered with {status}: {answer[:300]!r}")
    return [[one["reward"] for one in group["results"]] for group in json.loads(answer)["groups"]]


async def _under_load(
    port: int, requests: Sequence[Request], others: Sequence[Request], rate: float, seconds: float
) -> list[list[float]]:
    """Send each request again and again until it is accepted; empty if it never is."""
    stopped, client = asyncio.Event(), Client(port)
    plan = [(at, others[n % len(others)]) for n, at in enumerate(arrivals(rate, seconds, 3))]
    noise = asyncio.create_task(open_loop(Client(port, "noise"), plan, stopped=stopped))
    await asyncio.sleep(min(2.0, seconds / 4))

    async def insisted(number: int, request: Request) -> list[float]:
        while not noise.done():
            status, answer = await client.post(request, number)
            if status == 200:
                return _scores(answer)
            await asyncio.sleep(0.1)
        return []

    found = await asyncio.gather(*(insisted(*pair) for pair in enumerate(requests)))
    stopped.set()
    await noise
    client.close()
    return list(found)
