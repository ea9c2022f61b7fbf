"""The HTTP application: validate, queue, score and answer requests. Needs fastapi."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from logratio.serving.connections import BoundedBody
from logratio.serving.limits import Limits, RefusedError
from logratio.serving.protocol import SCORES, ErrorResponse, Health
from logratio.serving.request_faults import describe
from logratio.serving.request_record import current_record
from logratio.serving.reranker import Reranker
from logratio.serving.routes_models import add_models
from logratio.serving.routes_rerank import add_rerank
from logratio.serving.routes_score import add_scores
from logratio.serving.scheduler import Scheduler
from logratio.serving.service import ScoringService, State

_DESCRIPTION = (
    f"Orders completions of a prompt by the implicit reward of a trained policy. {SCORES}"
)
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 408, 413, 422, 429, 500, 503, 504)
}


def build_app(reranker: Reranker, limits: Limits, *, strict: bool = False) -> FastAPI:
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
    app.state.server, app.state.scheduler = state, scheduler
    app.add_middleware(BoundedBody, limits=limits)
    _add_refusals(app)
    _add_health(app, state)
    service = ScoringService(reranker, limits, scheduler, state)
    add_rerank(app, service, _REFUSALS, strict=strict)
    add_scores(app, service, _REFUSALS, strict=strict)
    add_models(app, reranker)
    return app


def _add_health(app: FastAPI, state: State) -> None:
    @app.get("/livez", summary="The process is alive")
    async def livez() -> Health:
        return Health(status="live")

    async def readyz() -> Health:
        if state.leaving or state.draining:
            raise RefusedError(503, "draining", "the server is shutting down")
        return Health(status="ready")

    for path in ("/readyz", "/health"):
        app.get(
            path, summary="The bundle is loaded and verified, and the server is not stopping",
            responses={503: {"model": ErrorResponse}}, operation_id=path.removeprefix("/"),
        )(readyz)  # fmt: skip


def _add_refusals(app: FastAPI) -> None:
    """Answer every error in the same format, without content of the request."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RefusedError)
        current_record().cause = error.code
        return JSONResponse(error.body(), error.status, error.headers())

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await refused(request, RefusedError(422, "malformed", describe(error)))

    async def other(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method"}.get(error.status_code, "malformed")
        known = {404: "no such path", 405: "method not allowed"}
        message = known.get(error.status_code, "the request cannot be read")
        return await refused(request, RefusedError(error.status_code, code, message))

    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, other)
