"""`logratio serve`: serve a bundle over HTTP with uvicorn."""

import asyncio
import errno
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from logratio.bundle import CACHED_REFERENCE
from logratio.errors import ConfigError, InputError
from logratio.extras import require
from logratio.serving.limits import Limits
from logratio.serving.reranker import Reranker
from logratio.serving.session import LOAD_SECONDS

if TYPE_CHECKING:
    from fastapi import FastAPI

_KEEP_ALIVE_SECONDS = 60
_HEADER_BYTES = 16 * 2**10
_BACKLOG = 2048
_OTHER_FILES = 64
"""File descriptors reserved for everything except connections."""


def create_app(
    reranker: Reranker, limits: Limits | None = None, *, strict: bool = False
) -> "FastAPI":
    """Create an ASGI application that serves a loaded bundle, for any ASGI server.

    Args:
        reranker: The loaded bundle.
        limits: Limits on requests and connections.
        strict: Refuse requests with unknown fields, instead of naming the fields in `warnings`.

    Raises:
        MissingExtraError: fastapi is not installed.
    """
    require("fastapi", "serve")
    from logratio.serving.app import build_app

    return build_app(reranker, limits or Limits(), strict=strict)


def serve(
    bundle: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    providers: Sequence[str] | None = None,
    allow_fallback: bool = False,
    threads: int | None = None,
    limits: Limits | None = None,
    strict: bool = False,
    expect: str | None = None,
    allowed_signers: str | Path | None = None,
    load_seconds: float = LOAD_SECONDS,
    cache: str | Path | None = None,
) -> None:
    """Serve a bundle until SIGTERM or Ctrl-C, then finish the requests in flight.

    The server has no authentication: if others can reach the address, put a proxy in front.

    Args:
        bundle: Folder written by `logratio export`.
        host: Address to listen on.
        port: Port to listen on; 0 for any free port.
        providers: As in `Reranker.load`.
        allow_fallback: As in `Reranker.load`.
        threads: As in `Reranker.load`.
        limits: Limits on requests and connections.
        strict: As in `create_app`.
        expect: As in `Reranker.load`.
        allowed_signers: As in `Reranker.load`.
        load_seconds: As in `Reranker.load`.
        cache: As in `Reranker.load`; needed for a bundle that takes the reference's log-probs as an
            input, since requests contain none.

    Raises:
        ConfigError: The bundle needs a cache.
        OSError: The server cannot listen on the address.
        BundleError, ProviderError, MissingExtraError: As `Reranker.load`.
    """
    uvicorn = require("uvicorn", "serve")
    require("fastapi", "serve")
    limits = within_open_files(limits or Limits())
    with _listen(host, port) as listener:
        reranker = Reranker.load(
            bundle,
            providers=providers,
            allow_fallback=allow_fallback,
            threads=threads,
            expect=expect,
            allowed_signers=allowed_signers,
            load_seconds=load_seconds,
            cache=cache,
        )
        if cache is None and reranker.manifest.graph.kind == CACHED_REFERENCE:
            raise ConfigError(
                "this bundle needs the reference's log-probs of each candidate: give --cache"
            )
        app = create_app(reranker, limits, strict=strict)
        _announce(reranker, host, listener.getsockname()[1])
        with _stopping_quietly():
            make_server(uvicorn, app, limits).run(sockets=[listener])


def within_open_files(limits: Limits) -> Limits:
    """Lower the connection limit to the number of files that the process may open."""
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = allowed - _OTHER_FILES - limits.probe_connections
    if allowed == resource.RLIM_INFINITY or room >= limits.connections:
        return limits
    return replace(limits, connections=max(1, room))


def make_server(uvicorn: Any, app: "FastAPI", limits: Limits) -> Any:
    """Create uvicorn's server; its ``run`` takes the listening sockets."""
    from logratio.serving.connections import protocol

    class Server(uvicorn.Server):  # type: ignore[misc]  # known only at run time
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.server.draining = True
            super().handle_exit(sig, frame)

    return Server(
        uvicorn.Config(
            app,
            http=protocol(limits),
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=limits.shutdown_seconds,
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


def _announce(reranker: Reranker, host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    name, where = reranker.manifest.name, f"http://{shown}:{port}"
    sys.stderr.write(
        f"{name} on {where} ({reranker.provider}): POST /v1/rerank, GET /livez, GET /readyz\n"
    )
    if not _is_loopback(host):
        sys.stderr.write(
            f"{host} can be reached from other machines, and the server has no authentication: "
            "put a proxy with authentication in front\n"
        )
    sys.stderr.flush()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _stopping_quietly() -> Iterator[None]:
    """Ignore the SIGTERM that uvicorn raises again after shutdown, so that the exit code is 0.

    Also hide the traceback of a second Ctrl-C during shutdown.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, before)
