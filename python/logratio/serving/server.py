"""`logratio serve`: serve bundles over HTTP with uvicorn."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

from logratio.errors import InputError
from logratio.extras import require
from logratio.progress import say
from logratio.serving.config import ServeConfig
from logratio.serving.configured_bundles import ConfiguredBundles
from logratio.serving.limits import Limits
from logratio.serving.reranker import Reranker
from logratio.serving.tracing import Tracing, check_protocol, otlp_tracing

if TYPE_CHECKING:
    from fastapi import FastAPI

    from logratio.serving.access_log import Log
    from logratio.serving.keys import Keys

_BACKLOG = 2048
_OTHER_FILES = 64
"""File descriptors reserved for everything except connections."""
_REFUSAL_SHARE = 0.1
"""Share of the time to shut down in which requests that cannot be finished are refused."""
_LOGGERS = ("uvicorn", "logratio", "asyncio", "opentelemetry")
_REQUIRED = ("fastapi", "uvicorn", "prometheus_client")


def create_app(
    reranker: Reranker | Mapping[str, Reranker],
    limits: Limits | None = None,
    *,
    strict: bool = False,
    keys: "Keys | None" = None,
    cors_origins: Sequence[str] = (),
    log: "Log | None" = None,
    response_cache_mb: float = 0.0,
    page: bool = True,
    tracing: Tracing | None = None,
) -> "FastAPI":
    """Create an ASGI application that serves loaded bundles, for any ASGI server.

    Args:
        reranker: The loaded bundle, or several by name, the default one first.
        limits: Limits on requests and connections.
        strict: Refuse requests with unknown fields, instead of naming the fields in `warnings`.
        keys: API keys, one of which every request but a health probe must have; None: no check.
        cors_origins: Origins whose web pages may send requests.
        log: Writes a line per request; None: no lines.
        response_cache_mb: Memory in MiB for scores of earlier requests; 0: none are kept.
        page: Serve the pages: at `/` a form that shows the ranking of candidates, at `/docs` the
            reference of the API.
        tracing: Makes the spans of each request; None: no spans.

    Raises:
        MissingExtraError: fastapi or prometheus-client is not installed.
    """
    _require_all()
    from logratio.serving.app import build_app

    return build_app(
        {"": reranker} if isinstance(reranker, Reranker) else reranker,
        limits or Limits(),
        strict=strict,
        keys=keys,
        cors_origins=cors_origins,
        log=log,
        response_cache_mb=response_cache_mb,
        page=page,
        tracing=tracing,
    )


def _require_all() -> None:
    for module in _REQUIRED:
        require(module, "serve")


def serve(config: ServeConfig, *, limits: Limits | None = None) -> None:
    """Serve bundles until SIGTERM or Ctrl-C, then finish the requests in flight.

    API keys are read from the file of the settings and from the variable `LOGRATIO_API_KEYS`.

    Args:
        config: The settings.
        limits: Limits on requests and connections that `config` has no setting for.

    Raises:
        OSError: The server cannot listen on the address.
        ConfigError: The address can be reached from other machines and there are no keys; the keys
            or the certificate cannot be used; a bundle needs a cache; or traces cannot be sent.
        BundleError, ProviderError, MissingExtraError: As `Reranker.load`.
        WorkerError: A process ended before it was ready.
    """
    with _stopped_at_once():
        _require_all()
        _check(config)
        limits = within_open_files(config.limits(limits))
        with _listen(config.host, config.port) as listener:
            announce = partial(_announce, config, listener.getsockname()[1])
            if config.workers == 1:
                serve_on(listener, config, limits, lambda app: announce(app.state.bundles.title))
                return
            from logratio.serving.worker_processes import serve_in_processes

            with _logging(config):
                serve_in_processes(serve_on, listener, config, limits, announce)


def _check(config: ServeConfig) -> None:
    """Check what needs no bundle, before one is read."""
    from logratio.serving.keys import read_keys

    config.check_access(has_keys=len(read_keys(config.api_key_file)) > 0)
    config.check_certificate()
    if config.otel:
        check_protocol()
    config.expected()


def serve_on(
    listener: socket.socket, config: ServeConfig, limits: Limits, ready: Callable[[Any], None]
) -> None:
    """Load the bundles, and serve them in this process on a listening socket.

    Args:
        listener: The socket.
        config: The settings.
        limits: Limits on requests and connections.
        ready: Is called with the application once it accepts connections.
    """
    from logratio.serving.bundles import Reloader
    from logratio.serving.keys import read_keys

    with _hangups() as asked:
        bundles = ConfiguredBundles(config)
        rerankers = bundles.load_all()
        with _logging(config) as log, _tracing(config) as tracing:
            app = create_app(
                rerankers,
                limits,
                strict=config.strict,
                keys=read_keys(config.api_key_file) or None,
                cors_origins=config.cors_origin or (),
                log=log,
                response_cache_mb=config.response_cache_mb,
                page=not config.no_page,
                tracing=tracing,
            )
            rerankers.clear()  # a bundle that is replaced must be freed
            Reloader(app.state.bundles, config.folders(), bundles.load, app.state.metrics, asked)
            uvicorn = require("uvicorn", "serve")
            server = make_server(uvicorn, app, limits, config, lambda: ready(app))
            with _stopping_quietly(server):
                server.run(sockets=[listener])


def within_open_files(limits: Limits) -> Limits:
    """Lower the connection limit to the number of files that the process may open, and say so."""
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = allowed - _OTHER_FILES - limits.probe_connections
    if allowed == resource.RLIM_INFINITY or room >= limits.connections:
        return limits
    connections = max(1, room)
    say(
        f"--max-connections is {connections} instead of {limits.connections}, because the process "
        f"may open only {allowed} files (`ulimit -n`)"
    )
    return replace(limits, connections=connections)


def make_server(
    uvicorn: Any,
    app: "FastAPI",
    limits: Limits,
    config: ServeConfig | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Any:
    """Create uvicorn's server; its ``run`` takes the listening sockets.

    Args:
        uvicorn: The module.
        app: The application of `create_app`.
        limits: Limits on connections.
        config: TLS files, and the time before the listener closes; None: neither.
        ready: Is called once connections are accepted.
    """
    from logratio.serving.connections import protocol

    drain_seconds, state = config.drain_seconds if config else 0.0, app.state.server

    class Server(uvicorn.Server):  # type: ignore[misc]  # known only at run time
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if drain_seconds and sig == signal.SIGTERM and state.closes_at is None:
                state.closes_at = time.monotonic() + drain_seconds
                return
            state.draining = True
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn cancels what is left at the end of the time, with status 500.
            seconds = (1 - _REFUSAL_SHARE) * limits.shutdown_seconds
            asyncio.get_running_loop().call_later(seconds, app.state.scheduler.refuse_all)
            await super().shutdown(sockets)

        async def on_tick(self, counter: int) -> bool:
            if state.closes_at is not None and time.monotonic() >= state.closes_at:
                state.draining = self.should_exit = True
            return bool(await super().on_tick(counter))

    return Server(
        uvicorn.Config(
            app,
            http=protocol(limits),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=limits.shutdown_seconds,
            ssl_certfile=config.tls_cert if config else None,
            ssl_keyfile=config.tls_key if config else None,
        )
    )


def _listen(host: str, port: int) -> socket.socket:
    """Bind the address before the bundle is loaded, so that a used port fails early."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {host} is in use: choose another with --port"
            raise InputError(errno.EADDRINUSE, reason) from error
        raise


@contextmanager
def _logging(config: ServeConfig) -> Iterator["Log"]:
    """Write the lines of requests and of the libraries to standard error, in one format."""
    from logratio.serving.access_log import LineWriter, Log

    writer = LineWriter()
    log = Log(writer, config.log_format)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(log)
    logging.getLogger("logratio.serving").setLevel(logging.INFO)  # lines about reloads
    try:
        yield log
    finally:
        for logger in loggers:
            logger.removeHandler(log)
        writer.close()


@contextmanager
def _tracing(config: ServeConfig) -> Iterator[Tracing | None]:
    """Send spans to a collector, if the settings ask for it."""
    tracing = otlp_tracing() if config.otel else None
    try:
        yield tracing
    finally:
        if tracing is not None:
            tracing.close()


def _announce(config: ServeConfig, port: int, title: str) -> None:
    shown = f"[{config.host}]" if ":" in config.host else config.host
    scheme, count = "https" if config.tls_cert else "http", config.workers
    several = f", {count} processes" if count > 1 else ""
    sys.stderr.write(
        f"{title} on {scheme}://{shown}:{port} (POST /v1/rerank, GET /livez, GET /readyz, GET "
        f"/metrics){several}\n"
    )
    sys.stderr.flush()


@contextmanager
def _hangups() -> Iterator["SimpleQueue[None]"]:
    """Put an item into a queue at each SIGHUP, also during the start."""
    asked: SimpleQueue[None] = SimpleQueue()
    before = signal.signal(signal.SIGHUP, lambda *_: asked.put(None))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _stopped_at_once() -> Iterator[None]:
    """End the process with 0 on SIGTERM, until uvicorn handles it: no request is in flight yet.

    Without a handler, the kernel ignores SIGTERM for process 1 of a container. The process ends
    without Python's own end, because ONNX Runtime cannot be interrupted while it opens a graph.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stopping_quietly(server: Any) -> Iterator[None]:
    """Ignore the SIGTERM that uvicorn raises again after shutdown, so that the exit code is 0.

    Before uvicorn handles signals, it still ends the process. Also hide the traceback of a second
    Ctrl-C during shutdown.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: server.should_exit or os._exit(0))
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)
