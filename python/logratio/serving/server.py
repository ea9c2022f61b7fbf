"""`logratio serve`: serve a bundle over HTTP with uvicorn."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from logratio.bundle import CACHED_REFERENCE
from logratio.errors import ConfigError, InputError
from logratio.extras import require
from logratio.serving.config import ServeConfig
from logratio.serving.limits import Limits
from logratio.serving.reranker import Reranker

if TYPE_CHECKING:
    from fastapi import FastAPI

    from logratio.serving.access_log import Log
    from logratio.serving.keys import Keys

_KEEP_ALIVE_SECONDS = 60
_BACKLOG = 2048
_OTHER_FILES = 64
"""File descriptors reserved for everything except connections."""
_REQUIRED = ("fastapi", "uvicorn", "prometheus_client")


def create_app(
    reranker: Reranker,
    limits: Limits | None = None,
    *,
    strict: bool = False,
    keys: "Keys | None" = None,
    cors_origins: Sequence[str] = (),
    log: "Log | None" = None,
) -> "FastAPI":
    """Create an ASGI application that serves a loaded bundle, for any ASGI server.

    Args:
        reranker: The loaded bundle.
        limits: Limits on requests and connections.
        strict: Refuse requests with unknown fields, instead of naming the fields in `warnings`.
        keys: API keys, one of which every request but a health probe must have; None: no check.
        cors_origins: Origins whose web pages may send requests.
        log: Writes a line per request; None: no lines.

    Raises:
        MissingExtraError: fastapi or prometheus-client is not installed.
    """
    for module in _REQUIRED:
        require(module, "serve")
    from logratio.serving.app import build_app

    return build_app(
        reranker,
        limits or Limits(),
        strict=strict,
        keys=keys,
        cors_origins=cors_origins,
        log=log,
    )


def serve(config: ServeConfig, *, limits: Limits | None = None) -> None:
    """Serve a bundle until SIGTERM or Ctrl-C, then finish the requests in flight.

    API keys are read from the file of the settings and from the variable `LOGRATIO_API_KEYS`.

    Args:
        config: The settings.
        limits: Limits on requests and connections that `config` has no setting for.

    Raises:
        OSError: The server cannot listen on the address.
        ConfigError: The address can be reached from other machines and there are no keys; the keys
            or the certificate cannot be used; or the bundle needs a cache.
        BundleError, ProviderError, MissingExtraError: As `Reranker.load`.
    """
    with _stopped_at_once():
        for module in _REQUIRED:
            require(module, "serve")
        from logratio.serving.keys import read_keys

        keys = read_keys(config.api_key_file)
        config.check_access(has_keys=len(keys) > 0)
        config.check_certificate()
        limits = within_open_files(config.limits(limits))
        with _listen(config.host, config.port) as listener:
            reranker = _load(config)
            with _logging(config) as log:
                app = create_app(
                    reranker,
                    limits,
                    strict=config.strict,
                    keys=keys or None,
                    cors_origins=config.cors_origin or (),
                    log=log,
                )
                server = make_server(require("uvicorn", "serve"), app, limits, config)
                _announce(reranker, config, listener.getsockname()[1])
                with _stopping_quietly(server):
                    server.run(sockets=[listener])


def _load(config: ServeConfig) -> Reranker:
    reranker = Reranker.load(
        config.bundle,
        providers=[config.provider] if config.provider else None,
        allow_fallback=config.allow_fallback,
        threads=config.threads,
        expect=config.expect,
        allowed_signers=config.allowed_signers,
        load_seconds=config.load_seconds,
        cache=config.cache,
    )
    if config.cache is None and reranker.manifest.graph.kind == CACHED_REFERENCE:
        raise ConfigError(
            "this bundle needs the reference's log-probs of each candidate: give --cache"
        )
    return reranker


def within_open_files(limits: Limits) -> Limits:
    """Lower the connection limit to the number of files that the process may open."""
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = allowed - _OTHER_FILES - limits.probe_connections
    if allowed == resource.RLIM_INFINITY or room >= limits.connections:
        return limits
    return replace(limits, connections=max(1, room))


def make_server(
    uvicorn: Any, app: "FastAPI", limits: Limits, config: ServeConfig | None = None
) -> Any:
    """Create uvicorn's server; its ``run`` takes the listening sockets.

    Args:
        uvicorn: The module.
        app: The application of `create_app`.
        limits: Limits on connections.
        config: TLS files, and the time before the listener closes; None: neither.
    """
    from logratio.serving.connections import protocol

    drain_seconds = config.drain_seconds if config else 0.0

    class Server(uvicorn.Server):  # type: ignore[misc]  # known only at run time
        closes_at: float | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            state = app.state.server
            if drain_seconds and sig == signal.SIGTERM and not state.leaving:
                state.leaving, self.closes_at = True, time.monotonic() + drain_seconds
                return
            state.draining = True
            super().handle_exit(sig, frame)

        async def on_tick(self, counter: int) -> bool:
            if self.closes_at is not None and time.monotonic() >= self.closes_at:
                app.state.server.draining = self.should_exit = True
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
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
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
    loggers = [logging.getLogger(name) for name in ("uvicorn", "logratio", "asyncio")]
    for logger in loggers:
        logger.addHandler(log)
    try:
        yield log
    finally:
        for logger in loggers:
            logger.removeHandler(log)
        writer.close()


def _announce(reranker: Reranker, config: ServeConfig, port: int) -> None:
    shown = f"[{config.host}]" if ":" in config.host else config.host
    name, scheme = reranker.manifest.name, "https" if config.tls_cert else "http"
    sys.stderr.write(
        f"{name} on {scheme}://{shown}:{port} ({reranker.provider}): POST /v1/rerank, GET /livez, "
        "GET /readyz, GET /metrics\n"
    )
    sys.stderr.flush()


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
