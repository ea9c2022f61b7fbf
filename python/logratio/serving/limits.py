"""What a request may ask of the server, and the answers to one that asks too much."""

import re
from dataclasses import dataclass

from logratio.data.records import CODES
from logratio.errors import LogratioError


@dataclass(frozen=True)
class Limits:
    """Bounds on requests and connections; each is met with its own status.

    Attributes:
        body_bytes: Of a request, chunked or not: 413.
        documents: Candidates of one query: 422.
        document_characters: Of one candidate: an error for that candidate.
        query_characters: Of the query, all turns together: 422.
        document_tokens: Of one candidate; None: what the bundle's rules leave beside the query.
            Never cut: an error for that candidate.
        request_tokens: That the models compute for one request, padding included: 413.
        run_tokens: In one run of the graph, the piece of work between two looks at deadlines and
            at clients that have gone; see `runs.plan_runs`. Changes no score.
        queue: Requests that wait or are computed; one more is 429.
        queue_seconds: Longest expected wait before a request is computed: 503.
        seconds: From the arrival to the answer: 504, and the work is dropped. A request that would
            need more than half of it with the server to itself is 413.
        body_seconds: For the request to arrive, and for each pause of a client that reads its
            answer: 408, or the connection is closed.
        header_seconds: For a request's first line and headers to arrive: 408, or the connection is
            closed where nothing has come.
        connections: Open at once. One more closes the connection that has been silent for longest;
            where none is silent, it is answered 503, unless it is a health probe.
        probe_connections: Places beyond `connections` for health probes.
        shutdown_seconds: For requests in flight when the server is told to stop.
    """

    body_bytes: int = 2 * 2**20
    documents: int = 256
    document_characters: int = 65_536
    query_characters: int = 262_144
    document_tokens: int | None = None
    request_tokens: int = 131_072
    run_tokens: int = 512
    queue: int = 256
    queue_seconds: float = 5.0
    seconds: float = 30.0
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    connections: int = 512
    probe_connections: int = 16
    shutdown_seconds: int = 30


_CODE = re.compile(r"\[(\w+)\]")


class RefusedError(LogratioError):
    """A request gets no ranking.

    Attributes:
        status: Of HTTP.
        code: Stable, for programs.
        message: For people; holds no prompt, no path.
        retry_after: Seconds after which it would be taken, for 429 and 503.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int = 1) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str]]:
        """Return the JSON to answer with."""
        return {"error": {"code": self.code, "message": self.message}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        return {"Retry-After": str(self.retry_after)} if self.status in (429, 503) else {}


def public_reason(reason: str) -> str:
    """Replace the reason behind a code by the code's own words: a chat template may quote text."""
    code = _CODE.match(reason)
    return f"[{code[1]}] {CODES[code[1]]}" if code and code[1] in CODES else reason
