"""Limits of the server, and the error responses when a request exceeds them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from logratio.data.records import CODES
from logratio.errors import LogratioError


@dataclass(frozen=True)
class Limits:
    """Limits on requests and connections, with the HTTP status when one is exceeded.

    Attributes:
        body_bytes: Size of a request body, chunked or not: 413.
        prompts: Prompts per request of a route that takes several: 422.
        documents: Candidates per query: 422.
        document_characters: Characters per candidate: an error for that candidate.
        query_characters: Characters of the query, all turns together: 422.
        document_tokens: Tokens per candidate, which is never truncated: an error for that
            candidate. None: the room that the bundle's rules leave after the query.
        request_tokens: Tokens that the models compute for one request, including padding: 413.
        run_tokens: Tokens in one run of the graph. The scheduler checks deadlines and disconnected
            clients between runs; see `runs.plan_runs`. Does not change scores.
        queue: Requests that are waiting or being computed; one more is refused with 429.
        queue_seconds: Longest expected wait before computation starts: 503.
        seconds: Time from arrival to answer: 504, and the work is dropped. A request that would
            need more than half of it on an idle server is refused with 413.
        body_seconds: Time for the request body to arrive, and for each pause of a client that is
            reading its answer: 408, or the connection is closed.
        header_seconds: Time for the request line and headers to arrive: 408, or the connection is
            closed if no byte has arrived.
        idle_seconds: Time that a connection stays open between two requests.
        connections: Open connections. One more closes the connection that has been idle longest;
            if none is idle, it is refused with 503, unless it is a health probe.
        probe_connections: Additional connections reserved for health probes.
        shutdown_seconds: Time to finish requests in flight at shutdown.
    """

    body_bytes: int = 2 * 2**20
    prompts: int = 1024
    documents: int = 256
    document_characters: int = 65_536
    query_characters: int = 262_144
    document_tokens: int | None = None
    request_tokens: int = 131_072
    run_tokens: int = 256
    queue: int = 256
    queue_seconds: float = 5.0
    seconds: float = 30.0
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    idle_seconds: float = 60.0
    connections: int = 512
    probe_connections: int = 16
    shutdown_seconds: int = 30


ERRORS: Mapping[int, Mapping[str, str]] = {
    400: {"malformed": "the request cannot be read, or does not follow the protocol"},
    401: {"unauthorized": "the server has API keys, and the request has none of them"},
    404: {
        "not_found": "there is no such path",
        "model_not_found": "there is no bundle of this name",
        "unknown_version": "the bundle has another digest",
    },
    405: {"method": "the path has other methods"},
    408: {
        "slow_header": "the headers took longer than `--header-seconds` to arrive",
        "slow_body": "the body took longer than `--body-seconds` to arrive",
    },
    413: {
        "body_too_large": "the body has too many bytes",
        "too_many_tokens": "the request needs more than `--max-request-tokens`",
        "too_slow": "the request would need more than half of `--request-seconds`",
    },
    415: {"encoding": "the body is compressed"},
    422: {
        "malformed": "the body is not JSON, or a field is missing, unknown with `--strict`, or has "
        "another type",
        "query": "the prompt cannot be scored, or is too long",
        "document": "no candidate can be scored, or one for which the answer has no place",
        "no_prompts": "there are no prompts",
        "no_documents": "a prompt has no candidates",
        "too_many_prompts": "there are too many prompts",
        "too_many_documents": "a prompt has too many candidates",
        "no_token_values": "the bundle has no values per token",
    },
    429: {
        "queue_full": "`--max-concurrent-requests` are waiting; retry after the seconds in "
        "`Retry-After`"
    },
    500: {
        "internal": "a fault of the server",
        "graph_failed": "ONNX Runtime failed to run the graph, for example because memory ran out",
        "not_finite": "the model's score is NaN or infinite",
    },
    503: {
        "busy": "the server cannot answer in time; retry after the seconds in `Retry-After`",
        "connections": "`--max-connections` are open",
        "draining": "the server is stopping",
    },
    504: {"deadline": "the request took longer than `--request-seconds`"},
}
"""The codes of errors by HTTP status, with their meanings."""


def responses(model: type, statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """Describe errors for OpenAPI.

    Args:
        model: Body of the response.
        statuses: The HTTP statuses.
    """
    return {
        status: {
            "model": model,
            "description": "\n".join(
                f"`{code}`: {meaning}" for code, meaning in ERRORS[status].items()
            ),
        }
        for status in statuses
    }


_CODE = re.compile(r"\[(\w+)\]")


class RefusedError(LogratioError):
    """The server refuses a request.

    Attributes:
        status: The HTTP status.
        code: A stable code for programs.
        message: A message for people, without text of the request or paths.
        retry_after: Seconds to wait before a retry, for 429 and 503.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int = 1) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after

    def body(self, *, as_text: bool = False) -> dict[str, Any]:
        """Return the JSON body of the response.

        Args:
            as_text: Without the code, as the Open Inference Protocol has errors.
        """
        if as_text:
            return {"error": self.message}
        return {"error": {"code": self.code, "message": self.message}}

    def headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(self.retry_after)} if self.status in (429, 503) else {}


def stopping() -> RefusedError:
    """Return the refusal of a server that is shutting down."""
    return RefusedError(503, "draining", "the server is shutting down")


_LENGTHS = {"R304", "E304"}
"""Codes whose reasons contain numbers only."""


def public_reason(reason: str) -> str:
    """Replace a reason by the general text of its code, since a chat template may quote text."""
    code = _CODE.match(reason)
    if code and code[1] in _LENGTHS:
        return (
            f"{reason}: shorten it; the limit is that of the policy's training "
            "(`--max-prompt-length`, `--max-length`)"
        )
    return f"[{code[1]}] {CODES[code[1]]}" if code and code[1] in CODES else reason
