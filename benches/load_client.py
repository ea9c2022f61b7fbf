"""An HTTP client that counts latency from the planned arrival of each request.

The arrival times are drawn beforehand, and no request waits for the answer to an earlier one. A
client that waits measures a stall of the server as one slow request, and leaves out those that
would have arrived meanwhile (coordinated omission).
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_GONE = (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


@dataclass(frozen=True, slots=True)
class Request:
    """A request to send.

    Attributes:
        kind: A name, by which answers are grouped.
        body: JSON.
        path: The route.
    """

    kind: str
    body: bytes
    path: str = "/v1/rerank"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request; times are seconds since the start of the load.

    Attributes:
        kind: That of the request.
        number: Its position in the load; `X-Request-ID` has it.
        planned: When it was to be sent.
        sent: When it was sent.
        ended: When its answer was complete.
        status: The HTTP status; 0: no connection; -1: sent, but without a complete answer.
        answer: The body of the answer, if it is kept.
    """

    kind: str
    number: int
    planned: float
    sent: float
    ended: float
    status: int
    answer: bytes = b""

    @property
    def latency(self) -> float:
        """Seconds from the planned arrival to the complete answer."""
        return self.ended - self.planned


class Client:
    """Keeps connections open, and opens another whenever all of them wait for an answer."""

    def __init__(self, port: int, prefix: str = "load") -> None:
        self._port, self._prefix = port, prefix
        self._idle: list[Connection] = []

    async def post(self, request: Request, number: int) -> tuple[int, bytes]:
        """Send a request, and return status and body; see `Outcome` for the status."""
        try:
            connection = await self._connection()
        except OSError:
            return 0, b""
        reader, writer = connection
        writer.write(self._bytes(request, number))
        try:
            status, body, keeps = await _read_answer(reader)
        except _GONE:
            writer.close()
            return -1, b""
        if keeps:
            self._idle.append(connection)
        else:
            writer.close()
        return status, body

    async def _connection(self) -> Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port)

    def _bytes(self, request: Request, number: int) -> bytes:
        head = (
            f"POST {request.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"x-request-id: {self._prefix}-{number}\r\ncontent-length: {len(request.body)}\r\n\r\n"
        )
        return head.encode() + request.body

    def close(self) -> None:
        """Close the idle connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Return status, body, and whether the connection stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body = await reader.readexactly(int(fields[b"content-length"]))
    return int(head[9:12]), body, fields.get(b"connection") != b"close"


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Draw the arrival times of a Poisson process.

    Args:
        rate: Mean arrivals per second.
        seconds: Length of the load.
        seed: Seed.
    """
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, size=int(rate * seconds * 1.5) + 50)
    times = gaps.cumsum()
    return [float(at) for at in times[times < seconds]]


async def open_loop(
    client: Client,
    plan: Sequence[tuple[float, Request]],
    *,
    stopped: asyncio.Event | None = None,
    keep: bool = False,
) -> list[Outcome]:
    """Send each request at its planned time, and wait for all answers.

    Args:
        client: The client.
        plan: Times in seconds, ascending, and requests.
        stopped: Once set, no further request is sent.
        keep: Keep the bodies of answers.
    """
    start = time.perf_counter()

    async def one(number: int, planned: float, request: Request) -> Outcome:
        sent = time.perf_counter() - start
        status, body = await client.post(request, number)
        ended = time.perf_counter() - start
        return Outcome(request.kind, number, planned, sent, ended, status, body if keep else b"")

    tasks = []
    for number, (planned, request) in enumerate(plan):
        if (wait := start + planned - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if stopped is not None and stopped.is_set():
            break
        tasks.append(asyncio.create_task(one(number, planned, request)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(
    client: Client,
    request_of: Callable[[int], Request],
    *,
    at_once: int,
    seconds: float = float("inf"),
    most: int | None = None,
) -> list[Outcome]:
    """Send the next request as soon as one is answered: how capacity is measured.

    Args:
        client: The client.
        request_of: Returns the request with a number.
        at_once: Requests in flight.
        seconds: No request is sent after this time.
        most: Number of requests; None: no limit.
    """
    start, outcomes, numbers = time.perf_counter(), list[Outcome](), iter(range(most or 10**9))

    async def worker() -> None:
        for number in numbers:
            sent = time.perf_counter() - start
            if sent > seconds:
                return
            request = request_of(number)
            status, _ = await client.post(request, number)
            ended = time.perf_counter() - start
            outcomes.append(Outcome(request.kind, number, sent, sent, ended, status))

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return outcomes
