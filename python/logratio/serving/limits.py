"""What a request may ask of the server, and for how long."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; each is met with its own status.

    Attributes:
        body_bytes: Of a request, chunked or not: 413.
        documents: Candidates of one query: 422.
        document_characters: Of one candidate: 422.
        query_characters: Of the query, all turns together: 422.
        document_tokens: Of one candidate; None: what the bundle's rules leave beside the query.
            Never cut, always 422.
        queue: Requests that wait or are computed; one more is 429.
        seconds: From the arrival to the answer: 504, and what has not begun is dropped.
        body_seconds: For the request to arrive: 408.
        shutdown_seconds: For requests in flight when the server is told to stop.
    """

    body_bytes: int = 2 * 2**20
    documents: int = 256
    document_characters: int = 65_536
    query_characters: int = 262_144
    document_tokens: int | None = None
    queue: int = 64
    seconds: float = 30.0
    body_seconds: float = 30.0
    shutdown_seconds: int = 30
