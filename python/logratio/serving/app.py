"""The HTTP application: its routes, and the middleware around them. Needs fastapi."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from logratio.serving.access_log import METRICS, Log, Observed
from logratio.serving.bundles import Bundles, NamedInPath
from logratio.serving.connections import PROBES, BoundedBody
from logratio.serving.keys import Authenticated, Keys
from logratio.serving.limits import Limits, RefusedError, responses
from logratio.serving.metrics import CONTENT_TYPE, ServerMetrics
from logratio.serving.page import PAGES, add_pages
from logratio.serving.protocol import SCORES, ErrorResponse, Health
from logratio.serving.request_faults import describe
from logratio.serving.request_record import current_record
from logratio.serving.reranker import Reranker
from logratio.serving.response_cache import ResponseCache
from logratio.serving.routes_models import SERVER, add_models
from logratio.serving.routes_open_inference import OPEN_INFERENCE, add_open_inference
from logratio.serving.routes_rerank import RERANK, add_rerank
from logratio.serving.routes_score import SCORE, add_scores
from logratio.serving.scheduler import Scheduler
from logratio.serving.service import UNNAMED, Shared, State
from logratio.serving.tracing import Tracing

_DESCRIPTION = (
    f"Orders completions of a prompt by the implicit reward of a trained policy. {SCORES}"
)
_REFUSALS = responses(ErrorResponse, (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504))
_GROUPS = [
    {"name": RERANK, "description": "One prompt's documents, the best first."},
    {"name": SCORE, "description": "Rewards of candidates, in the order of the request."},
    {"name": OPEN_INFERENCE, "description": "The routes of KServe, Triton and MLServer."},
    {"name": SERVER, "description": "Bundles, versions and health."},
]


def build_app(
    rerankers: Mapping[str, Reranker],
    limits: Limits,
    *,
    strict: bool,
    keys: Keys | None,
    cors_origins: Sequence[str],
    log: Log | None,
    response_cache_mb: float,
    page: bool,
    tracing: Tracing | None,
) -> FastAPI:
    """Build the application of `create_app`.

    Its ``state`` has the `State` (``server``), the `Bundles` (``bundles``), the `Scheduler`
    (``scheduler``) and the `ServerMetrics` (``metrics``).
    """
    metrics = ServerMetrics(
        [name or UNNAMED for name in rerankers], lambda: log.dropped if log else 0
    )
    cache = ResponseCache(response_cache_mb) if response_cache_mb else None
    shared = Shared(limits, Scheduler(limits, metrics), State(), metrics, cache)
    bundles = Bundles(rerankers, shared)
    app = FastAPI(
        title="logratio",
        description=_DESCRIPTION,
        version=bundles.first.reranker.manifest.versions["logratio"],
        lifespan=partial(_lifespan, bundles, shared),
        openapi_tags=_GROUPS,
        docs_url=None,  # FastAPI's own pages load scripts from other sites
        redoc_url=None,
    )
    app.state.server, app.state.bundles, app.state.metrics = shared.state, bundles, metrics
    app.state.scheduler = shared.scheduler
    _add_refusals(app)
    _add_health(app, shared.state)
    add_rerank(app, bundles, _REFUSALS, strict=strict)
    add_scores(app, bundles, _REFUSALS, strict=strict)
    add_models(app, bundles)
    add_open_inference(app, bundles, shared.state, strict=strict)
    if page:
        add_pages(app, has_keys=keys is not None)

    @app.get(METRICS, include_in_schema=False)
    async def scrape() -> Response:
        return Response(metrics.text(bundles), media_type=CONTENT_TYPE)

    _answer_head(app)
    # Each is wrapped around those before it, so a request meets the last one first.
    app.add_middleware(NamedInPath, bundles=bundles)
    app.add_middleware(BoundedBody, limits=limits, check_open=shared.scheduler.check_open)
    if keys is not None:
        app.add_middleware(Authenticated, keys=keys, open_paths=PAGES if page else ())
    if cors_origins:
        _allow_origins(app, cors_origins)
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(Observed, log=log, paths=paths, finished=metrics.finished, tracing=tracing)
    return app


@asynccontextmanager
async def _lifespan(bundles: Bundles, shared: Shared, _: FastAPI) -> AsyncIterator[None]:
    """Warm up before the server accepts connections; drop all work after it has stopped."""
    await asyncio.to_thread(bundles.warm_up)  # no variable here may keep a bundle in memory
    yield
    shared.state.draining = True
    shared.scheduler.close()


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[*origins],
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "traceparent", "X-API-Key", "X-Request-ID"],
        expose_headers=["X-Request-ID", "X-Bundle-Digest", "Retry-After"],
    )


def _add_health(app: FastAPI, state: State) -> None:
    @app.get("/livez", summary="The process is alive", tags=[SERVER])
    async def livez() -> Health:
        return Health(status="live")

    async def readyz() -> Health:
        state.check_ready()
        return Health(status="ready")

    for path in ("/readyz", "/health"):
        app.get(
            path, summary="The bundles are loaded and verified, and the server is not stopping",
            responses=responses(ErrorResponse, [503]), operation_id=path.removeprefix("/"),
            tags=[SERVER],
        )(readyz)  # fmt: skip


def _answer_head(app: FastAPI) -> None:
    """Let probes be asked with HEAD, too, as some load balancers do."""
    for route in [*app.routes]:
        if isinstance(route, APIRoute) and route.path in PROBES:
            app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


def _add_refusals(app: FastAPI) -> None:
    """Answer every error in the same format, without content of the request."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RefusedError)
        record = current_record()
        record.cause = error.code
        body = error.body(as_text=record.has_text_errors)
        return JSONResponse(body, error.status, error.headers())

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
