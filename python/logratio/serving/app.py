"""The HTTP application: validate, queue, score and answer requests. Needs fastapi."""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from logratio.data.records import InvalidRecordError
from logratio.serving.candidates import Candidate, CandidateGroup
from logratio.serving.connections import BoundedBody
from logratio.serving.limits import Limits, RefusedError, public_reason
from logratio.serving.protocol import (
    SCORES,
    UNSUPPORTED,
    Document,
    DocumentFault,
    ErrorResponse,
    Health,
    Meta,
    RerankRequest,
    RerankResponse,
    Result,
    Turn,
    Usage,
)
from logratio.serving.reranker import Reranker, Score, Scoring, ranked
from logratio.serving.scheduler import Scheduler

PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
_DESCRIPTION = (
    f"Orders completions of a prompt by the implicit reward of a trained policy. {SCORES}"
)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 408, 413, 422, 429, 500, 503, 504)
}
_log = logging.getLogger("logratio.serving")


@dataclass
class State:
    """The mutable state of a running server."""

    draining: bool = False


def build_app(reranker: Reranker, limits: Limits) -> FastAPI:
    """Build the application; ``app.state.server`` is its `State`."""
    scheduler, state = Scheduler(limits), State()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for tokens, seconds in await asyncio.to_thread(reranker.timings):
            scheduler.pace.learn(tokens, seconds)
        yield
        state.draining = True
        scheduler.close()

    # The documentation pages load scripts from other sites; /openapi.json is enough.
    app = FastAPI(
        title="logratio", description=_DESCRIPTION, version=reranker.manifest.versions["logratio"],
        lifespan=lifespan, docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.server = state
    app.add_middleware(BoundedBody, limits=limits)
    _add_refusals(app)
    _add_health(app, state)
    service = RerankService(reranker, limits, scheduler, state)
    for path in PATHS:
        app.post(
            path, responses=_REFUSALS, response_model_exclude_none=True, description=SCORES,
            summary="Order documents", operation_id=f"rerank{path.replace('/', '_')}",
        )(service.rerank)  # fmt: skip
    return app


class RerankService:
    """Answer rerank requests."""

    def __init__(
        self, reranker: Reranker, limits: Limits, scheduler: Scheduler, state: State
    ) -> None:
        self._reranker, self._limits = reranker, limits
        self._scheduler, self._state = scheduler, state

    async def rerank(self, request: RerankRequest) -> RerankResponse:
        """Check a request, wait for its scores, and build the response.

        Raises:
            RefusedError: The request is invalid, too large, too late, or cannot be scored.
        """
        if self._state.draining:
            raise RefusedError(503, "draining", "the server is shutting down")
        texts = request.texts()
        characters = check_size(request, texts, self._limits)
        number = uuid.uuid4().hex
        try:
            scoring = await self._scheduler.run(characters, lambda: self._encode(request, texts))
        except RefusedError:
            raise
        except Exception as error:
            # No traceback and no message: either could hold the request's text.
            _log.error("request %s failed: %s", number, type(error).__name__)
            raise RefusedError(500, "internal", "the request could not be scored") from None
        return self._response(number, request, texts, scoring)

    def _encode(self, request: RerankRequest, texts: Sequence[str]) -> Scoring:
        """Tokenize and plan the graph runs; called in the scheduler's encoding thread."""
        # Texts over the limit are replaced by an empty one, so that the tokenizer never sees them.
        longest = self._limits.document_characters
        short = [text if len(text) <= longest else "" for text in texts]
        try:
            group = self._reranker.encode(request.prompt(), short)
        except InvalidRecordError as error:
            raise RefusedError(422, "query", public_reason(str(error))) from None
        group = with_limits(group, texts, self._limits)
        if all(candidate.error is not None for candidate in group.candidates):
            reason = public_reason(str(group.candidates[0].error))
            raise RefusedError(422, "document", f"no document can be scored; document 0: {reason}")
        return self._reranker.scoring(group, self._limits.run_tokens)

    def _response(
        self, number: str, request: RerankRequest, texts: Sequence[str], scoring: Scoring
    ) -> RerankResponse:
        scores, group, manifest = scoring.scores(), scoring.group, self._reranker.manifest
        errors = [_error(score) for score in scores if score.error is not None]
        if len(errors) == len(scores):
            raise RefusedError(500, "not_finite", "the model gives no finite score")
        scored = [score for score in ranked(scores) if score.error is None]
        results = [
            Result(
                index=score.index,
                relevance_score=score.reward,
                document=Document(text=texts[score.index]) if request.return_documents else None,
            )
            for score in scored[: request.top_n]
        ]
        prompt, completion = len(group.prompt_ids), sum(score.tokens for score in scores)
        return RerankResponse(
            id=number,
            model=manifest.name,
            results=results,
            errors=errors or None,
            meta=Meta(beta=manifest.beta, truncated_query=group.prompt_truncated),
            usage=Usage(
                prompt_tokens=prompt,
                completion_tokens=completion,
                total_tokens=prompt + completion,
            ),
        )


def _error(score: Score) -> DocumentFault:
    assert score.error is not None
    code = "not_finite" if score.tokens else "document"
    return DocumentFault(index=score.index, code=code, message=public_reason(score.error))


def check_size(request: RerankRequest, texts: Sequence[str], limits: Limits) -> int:
    """Check a request's size before tokenization.

    Returns:
        Number of characters to tokenize.

    Raises:
        RefusedError: 422, a limit is exceeded.
    """
    if not texts:
        raise RefusedError(422, "no_documents", "the request has no documents")
    if len(texts) > limits.documents:
        raise RefusedError(
            422, "too_many_documents", f"at most {limits.documents} documents a query"
        )
    query = request.query
    length = len(query) if isinstance(query, str) else sum(len(turn.content) for turn in query)
    if length > limits.query_characters:
        raise RefusedError(422, "query", f"the query is longer than {limits.query_characters:,} "
                                         "characters")  # fmt: skip
    longest = limits.document_characters
    return length + sum(len(text) for text in texts if len(text) <= longest)


def with_limits(group: CandidateGroup, texts: Sequence[str], limits: Limits) -> CandidateGroup:
    """Set an error on each document above a limit; truncating it would change its meaning."""
    candidates = [
        _limited(candidate, text, limits)
        for candidate, text in zip(group.candidates, texts, strict=True)
    ]
    return replace(group, candidates=tuple(candidates))


def _limited(candidate: Candidate, text: str, limits: Limits) -> Candidate:
    if len(text) > limits.document_characters:
        return Candidate((), error=f"longer than {limits.document_characters:,} characters")
    if limits.document_tokens is not None and len(candidate.ids) > limits.document_tokens:
        return Candidate((), error=f"longer than {limits.document_tokens:,} tokens")
    return candidate


def _add_health(app: FastAPI, state: State) -> None:
    @app.get("/livez", summary="The process is alive")
    async def livez() -> Health:
        return Health(status="live")

    @app.get("/readyz", summary="The bundle is loaded and verified, and the server is not stopping",
             responses={503: {"model": ErrorResponse}})  # fmt: skip
    async def readyz() -> Health:
        if state.draining:
            raise RefusedError(503, "draining", "the server is shutting down")
        return Health(status="ready")


def _add_refusals(app: FastAPI) -> None:
    """Answer every error in the same format, without content of the request."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RefusedError)
        return JSONResponse(error.body(), error.status, error.headers())

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await refused(request, RefusedError(422, "malformed", _where(error)))

    async def other(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method"}.get(error.status_code, "malformed")
        known = {404: "no such path", 405: "method not allowed"}
        message = known.get(error.status_code, "the request cannot be read")
        return await refused(request, RefusedError(error.status_code, code, message))

    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)


_KINDS = {
    "missing": "is missing",
    "list_type": "must be a list",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "greater_than_equal": "must be at least 1",
}
"""Messages for pydantic's error types; pydantic's own messages may quote the request."""


_NAMES = (*RerankRequest.model_fields, *Document.model_fields, *Turn.model_fields)


def _where(error: RequestValidationError) -> str:
    """Describe the invalid fields, without their values."""
    faults: dict[str, str] = {}
    for fault in error.errors()[:20]:
        if fault["type"] == "json_invalid":
            return "the body is not JSON"
        within = fault["loc"][1:]
        place = [part for part in within if part in _NAMES or isinstance(part, int)]
        if fault["type"] == "extra_forbidden":
            faults[".".join(map(str, within))] = _extra(within)
        elif not place:
            return (
                "the body is not a JSON object; is the header Content-Type: application/json set?"
            )
        else:
            faults |= _fault(place, fault["type"])
    inner = {where.partition(".")[0] for where in faults if where.startswith("query.")}
    return "; ".join(sorted(text for where, text in faults.items() if where not in inner)[:5])


def _fault(place: Sequence[int | str], kind: str) -> dict[str, str]:
    """Return an invalid value's place and what must be there."""
    if place[0] == "documents" and len(place) > 1:  # neither kind of document fits
        place, must = place[:2], "must be a string or an object with text"
    elif place == ["query"] and kind != "missing":
        must = "must be a string or a list of chat messages"
    else:
        must = _KINDS.get(kind, "has another type")
    where = ".".join(map(str, place))
    return {where: f"{where} {must}"}


def _extra(within: Sequence[int | str]) -> str:
    """Describe a field that is not supported; only plain words of the request are repeated."""
    name = str(within[-1])
    if name in UNSUPPORTED and len(within) == 1:
        return f"{name} is not supported: {UNSUPPORTED[name]}"
    shown = f" {name}" if re.fullmatch("[a-z_]{1,40}", name) else ""
    model = RerankRequest if len(within) == 1 else Turn
    place = "" if len(within) == 1 else " of a chat message"
    return f"unknown field{shown}{place}: there are {', '.join(model.model_fields)}"
