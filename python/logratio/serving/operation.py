"""What an application has for its operators: keys, CORS, request ids, a log, and metrics."""

from collections.abc import Sequence

from fastapi import FastAPI, Response
from starlette.middleware.cors import CORSMiddleware

from logratio.serving.access_log import METRICS, Log, Observed
from logratio.serving.keys import Authenticated, Keys
from logratio.serving.metrics import CONTENT_TYPE, ServerMetrics
from logratio.serving.reranker import Reranker


def add_operation(
    app: FastAPI,
    reranker: Reranker,
    keys: Keys | None = None,
    cors_origins: Sequence[str] = (),
    log: Log | None = None,
) -> None:
    """Add `/metrics` and middleware to an application of `build_app`.

    Args:
        app: The application, whose routes exist already.
        reranker: The bundle that it serves.
        keys: API keys; None: no check.
        cors_origins: Origins whose web pages may send requests.
        log: Writes a line per request; None: no lines.
    """
    metrics = ServerMetrics(app.state.scheduler, reranker)

    @app.get(METRICS, include_in_schema=False)
    async def scrape() -> Response:
        return Response(metrics.text(log.dropped if log else 0), media_type=CONTENT_TYPE)

    # Each is wrapped around those before it, so a request meets the last one first.
    if keys is not None:
        app.add_middleware(Authenticated, keys=keys)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[*cors_origins],
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    app.add_middleware(Observed, log=log, paths=paths, finished=metrics.finished)
