"""What is recorded about a request while it is handled: its id, times and sizes, no content."""

import re
import time
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

_OPEN_INFERENCE = re.compile(r"/v2/?|/v2/(models|health)(/.*)?", re.S)
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass
class RequestRecord:
    """The record of one request, for the log and the metrics.

    Attributes:
        id: The id in the header `X-Request-ID` of the answer.
        method: The HTTP method.
        route: The path of the route, or ``other``: any other path could hold content.
        started: Time of arrival, on the clock of `time.perf_counter`.
        status: Status of the answer; 0 if the client left before it.
        cause: Code of the error in the answer, if any.
        error: Class of an unexpected exception, if any.
        model: Name of a bundle in the path; None: the path has none.
        bundle: Name of the bundle that scored the request; empty if none did.
        digest: The bundle's digest; None: none scored it, or it has no files.
        seconds: Time in seconds of each phase: ``queue``, ``encode``, ``compute``.
        prompt_tokens: Tokens of the prompts.
        candidate_tokens: Tokens of the candidates.
        has_text_errors: Whether errors are text, as in the Open Inference Protocol.
        scored: Time at which the last phase ended, on the clock of `started`.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    method: str = ""
    route: str = ""
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    cause: str | None = None
    error: str | None = None
    model: str | None = None
    bundle: str = ""
    digest: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    candidate_tokens: int = 0
    has_text_errors: bool = False
    scored: float = 0.0

    @property
    def scoring_seconds(self) -> float:
        """Time in seconds of all phases together."""
        return sum(self.seconds.values())

    def add_tokens(self, prompt: int, candidates: int) -> None:
        """Count the tokens of a prompt and of its candidates."""
        self.prompt_tokens += prompt
        self.candidate_tokens += candidates

    def add_seconds(self, **phases: float) -> None:
        """Add the times of a piece of work; a request may consist of several."""
        self.scored = time.perf_counter()
        for phase, seconds in phases.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


_current: ContextVar[RequestRecord | None] = ContextVar("logratio_request", default=None)


def current_record() -> RequestRecord:
    """Return the record of the request that this task handles, or one that nobody reads."""
    return _current.get() or RequestRecord()


def begin(record: RequestRecord) -> None:
    """Make a record that of this task, and of the tasks that it starts."""
    _current.set(record)


def usable_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the client's `X-Request-ID` if it is short and plain, else a new id."""
    given = dict(headers).get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex


def is_open_inference(path: str) -> bool:
    """Return whether a path is one of the Open Inference Protocol; others begin with /v2, too."""
    return _OPEN_INFERENCE.fullmatch(path) is not None
