"""Scenarios of bench_load.py about faults: SIGTERM, kill -9, many connections, memory."""

import asyncio
import json
import resource
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from load_client import Client, Outcome, Request, arrivals, closed_loop, open_loop
from load_figures import Record, Row, answered, figures, percentiles
from load_material import BUNDLE, Texts, small_requests
from load_overload import capacity
from load_server import Server, cores, running, serve_command, start

_SHARE = 0.8
_DRAIN_SECONDS = 0.5
_NOTICE_SECONDS = 0.05
"""Interval at which a load balancer asks `/readyz`."""
_FIRST_SECONDS = 0.5
"""A signal is sent at a random time up to two seconds after this."""
_SETTLING_SECONDS = 5.0
"""Time in which a crowd connects, before anything is measured."""
_REOPENED_SECONDS = 10.0
_HEADERS = b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@dataclass(frozen=True)
class _Stopped:
    """One start, load and SIGTERM.

    Attributes:
        outcomes: All requests.
        code: Exit code.
        seconds: Time from the signal to the end of the process.
        logged: Ids of requests in the server's log, with their statuses.
    """

    outcomes: list[Outcome]
    code: int
    seconds: float
    logged: dict[str, int]


def stop(folder: Path, logs: Path, record: Record, signals: int, shape: str) -> None:
    """Send SIGTERM under load, half of the times with a load balancer that asks `/readyz`."""
    requests = small_requests(Texts.of(folder / BUNDLE), 500)
    with running(serve_command(folder / BUNDLE), logs / "stop.log") as server:
        rate = _SHARE * capacity(server.port, requests, 5)
    random = np.random.default_rng(9)
    for drain in (True, False):
        found = [
            _one_stop(folder, logs / "stop.log", requests, rate, float(random.uniform(0, 2)), drain)
            for _ in range(max(1, signals // 2))
        ]
        record.add("stop", {"shape": shape, "balancer": drain} | _summary(found))


def _one_stop(
    folder: Path, log: Path, requests: Sequence[Request], rate: float, wait: float, drain: bool
) -> _Stopped:
    seconds = str(_DRAIN_SECONDS if drain else 0)
    flags = ("--log-format", "json", "--drain-seconds", seconds)
    server = start(serve_command(folder / BUNDLE, *flags), log, cores()[0])
    try:
        plan = [(at, requests[n % len(requests)]) for n, at in enumerate(arrivals(rate, 60, 2))]
        outcomes, ended = asyncio.run(_signalled(server, plan, _FIRST_SECONDS + wait, drain))
        code = server.process.wait(60)
        lines = [line for line in server.lines() if "id" in line]
        logged = {str(line["id"]): int(str(line["status"])) for line in lines}
        return _Stopped(outcomes, code, ended, logged)
    finally:
        server.process.kill()
        server.process.wait()


async def _signalled(
    server: Server, plan: Sequence[tuple[float, Request]], wait: float, drain: bool
) -> tuple[list[Outcome], float]:
    """Send requests until the balancer or the client notices the end of the server."""
    stopped, client = asyncio.Event(), Client(server.port)
    sending = asyncio.create_task(open_loop(client, plan, stopped=stopped))
    await asyncio.sleep(wait)
    server.process.send_signal(signal.SIGTERM)
    signalled = time.perf_counter()

    async def ended() -> float:
        while server.process.poll() is None:
            await asyncio.sleep(0.01)
        return time.perf_counter() - signalled

    ending = asyncio.create_task(ended())
    if drain:
        while await asyncio.to_thread(server.status, "/readyz") == 200:
            await asyncio.sleep(_NOTICE_SECONDS)
        stopped.set()
    seconds = await ending
    stopped.set()
    outcomes = await sending
    client.close()
    return outcomes, seconds


def _summary(found: Sequence[_Stopped]) -> Row:
    """Count the requests that were lost.

    With a balancer every request that was sent must have an answer. Without one, a request may meet
    a closed connection; it is lost if the server logged it, and so had read it.
    """
    unanswered = lost = 0
    for one in found:
        missing = [outcome for outcome in one.outcomes if outcome.status == -1]
        unanswered += len(missing)
        lost += sum(f"load-{outcome.number}" in one.logged for outcome in missing)
    everything = [outcome for one in found for outcome in one.outcomes]
    return {
        "signals": len(found),
        "requests": len(everything),
        "answered": len(answered(everything)),
        "not_connected": sum(one.status == 0 for one in everything),
        "unanswered": unanswered,
        "lost": lost,
        "exit_codes": sorted({one.code for one in found}),
        "stop_seconds": percentiles([one.seconds for one in found]),
    }


def kill(folder: Path, logs: Path, record: Record, times: int, shape: str) -> None:
    """Kill the server under load, and start it again: time until ready, and the same scores."""
    requests = small_requests(Texts.of(folder / BUNDLE), 500)
    before: bytes | None = None
    for number in range(times):
        server = start(serve_command(folder / BUNDLE), logs / "kill.log", cores()[0])
        try:
            scores = asyncio.run(_answer(server.port, requests[0]))
            if before is None:
                before = scores
            rate = _SHARE * capacity(server.port, requests, 2)
            outcomes, _ = asyncio.run(_killed(server, requests, rate))
        finally:
            server.process.kill()
            server.process.wait()
        row = {"shape": shape, "number": number, "ready_seconds": round(server.seconds, 3)}
        row |= {"answered": len(answered(outcomes)), "same_scores": scores == before}
        row |= {"in_flight": sum(one.status == -1 for one in outcomes)}
        record.add("kill", row | {"left_files": _left_files(folder / BUNDLE)})


async def _killed(
    server: Server, requests: Sequence[Request], rate: float
) -> tuple[list[Outcome], None]:
    stopped, client = asyncio.Event(), Client(server.port)
    plan = [(at, requests[n % len(requests)]) for n, at in enumerate(arrivals(rate, 60, 4))]
    sending = asyncio.create_task(open_loop(client, plan, stopped=stopped))
    await asyncio.sleep(1.5)
    server.process.kill()
    await asyncio.sleep(0.2)
    stopped.set()
    return await sending, None


async def _answer(port: int, request: Request) -> bytes:
    """Return the results of a request, without id and time."""
    client = Client(port)
    _, answer = await client.post(request, 0)
    client.close()
    return json.dumps(json.loads(answer)["results"]).encode()


def _left_files(bundle: Path) -> int:
    """Count the files of the bundle's folder that its manifest does not have."""
    known = {"bundle.json", *json.loads((bundle / "bundle.json").read_text())["files"]}
    return len([path for path in bundle.iterdir() if path.name not in known])


def connections(
    folder: Path, logs: Path, record: Record, seconds: float, shape: str, *, idle: int, slow: int
) -> None:
    """Hold idle and slow connections open, and measure probes and requests meanwhile."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2 * (idle + slow) + 500), most))
    requests = small_requests(Texts.of(folder / BUNDLE), 500)
    with running(serve_command(folder / BUNDLE), logs / "connections.log") as server:
        rate = 0.3 * capacity(server.port, requests, min(seconds / 4, 10))
        for name, counts in (("none", (0, 0)), ("idle", (idle, 0)), ("slow", (0, slow))):
            row = asyncio.run(_crowded(server, requests, rate, seconds, *counts))
            row |= {"shape": shape, "crowd": name, "connections": sum(counts)}
            record.add("connections", row | {"descriptors": server.descriptors()})
        again = asyncio.run(_crowded(server, requests, rate, seconds / 2, 0, 0))
        row = {"shape": shape, "crowd": "after", "connections": 0}
        record.add("connections", row | again | {"descriptors": server.descriptors()})


async def _crowded(
    server: Server, requests: Sequence[Request], rate: float, seconds: float, idle: int, slow: int
) -> Row:
    crowd = [asyncio.create_task(_hold(server.port, None)) for _ in range(idle)]
    crowd += [asyncio.create_task(_hold(server.port, number)) for number in range(slow)]
    await asyncio.sleep(_SETTLING_SECONDS if crowd else 0.0)
    client = Client(server.port)
    plan = [(at, requests[n % len(requests)]) for n, at in enumerate(arrivals(rate, seconds, 5))]
    outcomes, probes = await asyncio.gather(open_loop(client, plan), _probes(server, seconds))
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    client.close()
    row = {f"probe_{name}": value for name, value in probes.items()}
    return row | figures(outcomes, seconds)


async def _probes(server: Server, seconds: float) -> Row:
    """Ask `/livez` on a new connection every 50 ms."""
    times, failed, start = list[float](), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            first = await reader.readline()
            writer.close()
        except OSError:
            first = b""
        failed += b" 200 " not in first
        times.append(time.perf_counter() - began)
        await asyncio.sleep(0.05)
    return {"ms": percentiles(times), "failed": failed}


async def _hold(port: int, slow: int | None) -> None:
    """Keep a connection busy for ever: silent, or slow in headers, body or reading.

    When the server closes it, it is opened again after some seconds.
    """
    while True:
        opened = socket.socket()
        opened.setblocking(False)
        # The kernel shall not take the answers that the client does not read.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError):
            await asyncio.get_running_loop().sock_connect(opened, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=opened, limit=1024)
            with closing(writer):
                await _dawdle(reader, writer, slow)
        await asyncio.sleep(_REOPENED_SECONDS)


async def _dawdle(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, slow: int | None
) -> None:
    if slow is None:
        await reader.read()
        return
    if slow % 3 == 0:  # one byte of the headers at a time
        content, head = _HEADERS * 20, b""
    elif slow % 3 == 1:  # one byte of the body at a time
        content, head = b" " * 1000, _HEADERS + b"content-length: 1000\r\n\r\n"
    else:  # requests for the large schema, whose answers are never read
        content, head = b"", b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 20
    writer.write(head)
    for byte in content:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.5)
    await asyncio.sleep(3600)


def memory(folder: Path, logs: Path, record: Record, requests_sent: int, shape: str) -> None:
    """Send thousands of requests, and read the server's memory after each tenth of them."""
    requests = small_requests(Texts.of(folder / BUNDLE), 2000)
    step = max(1, requests_sent // 10)
    with running(serve_command(folder / BUNDLE), logs / "memory.log") as server:
        sizes = [server.resident_bytes()]
        for number in range(10):
            asyncio.run(_some(server.port, requests, number * step, step))
            sizes.append(server.resident_bytes())
        row = {"shape": shape, "requests": 10 * step, "resident": sizes}
        # The first tenth warms up: buffers grow to the largest request.
        row |= {"growth": round(sizes[-1] / sizes[1] - 1, 4), "megabytes": round(sizes[-1] / 2**20)}
        record.add("memory", row | {"descriptors": server.descriptors()})


async def _some(port: int, requests: Sequence[Request], first: int, count: int) -> None:
    client = Client(port)
    found = await closed_loop(
        client, lambda n: requests[(first + n) % len(requests)], at_once=4, most=count
    )
    client.close()
    if len(answered(found)) < count:
        raise RuntimeError("requests of the memory scenario failed")
