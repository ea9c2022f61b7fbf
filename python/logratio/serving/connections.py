"""Limits on the number, size and duration of connections and request bodies."""

import asyncio
import fcntl
import json
import socket
import termios
from array import array
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from operator import attrgetter
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from logratio.errors import LogratioError
from logratio.serving.limits import Limits, RefusedError
from logratio.serving.request_record import current_record
from logratio.serving.strict_http import StrictConnection

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class ClientGoneError(LogratioError):
    """The client closed the connection before its request was complete."""


class BoundedBody:
    """ASGI middleware that limits the body, and cancels work when its client disconnects.

    Under overload it answers before the body is parsed: that takes longer than the refusal.
    """

    def __init__(self, app: App, limits: Limits, check_open: Callable[[], None]) -> None:
        """Wrap an application.

        Args:
            app: The application.
            limits: Limits on size and time.
            check_open: Raises `RefusedError` if no request to score would be accepted now.
        """
        self._app, self._limits, self._check_open = app, limits, check_open

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one HTTP request; pass other scopes to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope.get("state", {}).get(_IS_CROWDED) and scope["path"] not in PROBES:
            await refuse(send, _CROWDED)
            return
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _read(scope, receive, self._limits.body_bytes)
        except ClientGoneError:
            return
        except TimeoutError:
            await refuse(send, RefusedError(408, "slow_body", "the request body took too long"))
        except RefusedError as error:
            await refuse(send, error)
        else:
            await self._answer_if_open(scope, body, receive, send)

    async def _answer_if_open(
        self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send
    ) -> None:
        try:
            if scope["method"] == "POST":  # every such route scores
                self._check_open()
        except RefusedError as error:
            await refuse(send, error, closes=False)
        else:
            await _answer(self._app, scope, body, receive, send)


async def _read(scope: MutableMapping[str, Any], receive: Receive, limit: int) -> bytes:
    """Read a body and count its bytes, since chunked requests have no Content-Length."""
    too_large = RefusedError(413, "body_too_large", f"the limit is {limit:,} bytes per request")
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise RefusedError(415, "encoding", "send the body without compression")
    stated = headers.get(b"content-length", b"0")
    if stated.isdigit() and int(stated) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


async def _answer(
    app: App, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send
) -> None:
    """Run `app`, and cancel it if the client disconnects first."""
    gone = asyncio.ensure_future(_disconnect(receive))
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.shield(gone)

    answer = asyncio.ensure_future(app(scope, replay, send))
    try:
        await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
        with suppress(asyncio.CancelledError):
            await answer
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnect(receive: Receive) -> Message:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return message


async def refuse(send: Send, error: RefusedError, *, closes: bool = True) -> None:
    """Send an error, and close the connection unless its body has been read."""
    record = current_record()
    record.cause = error.code
    content = json.dumps(error.body(as_text=record.has_text_errors)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        *([(b"connection", b"close")] if closes else []),
        *((name.lower().encode(), value.encode()) for name, value in error.headers().items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


HEAD_BYTES = 16 * 2**10
"""Most bytes of a request line with its headers."""
PROBES = frozenset({"/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"})
_IS_CROWDED = "is_crowded"
_CROWDED = RefusedError(503, "connections", "too many connections are open")
_SLOW = RefusedError(408, "slow_header", "the request headers took too long")


class Connections:
    """The open connections, and which of them are silent: they have sent no complete request."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: set[GuardedProtocol] = set()
        self._silent: dict[GuardedProtocol, None] = {}  # in the order in which they became silent

    def open(self, connection: "GuardedProtocol") -> bool:
        """Add a new connection; at the limit, close the one that has been silent longest.

        Connections that have had an answer are closed last: their clients are about to send the
        next request, and many connections without any request would take their places. A
        connection whose request has arrived but was not read yet is not silent: among many new
        connections, requests would otherwise be lost.

        Returns:
            Whether the connection may stay open.
        """
        limit = self.limits.connections
        if len(self._open) >= limit:
            by_use = sorted(self._silent, key=attrgetter("was_answered"))
            if oldest := next((one for one in by_use if not one.has_unread_bytes()), None):
                self.close(oldest)
                oldest.transport.abort()
        self._open.add(connection)
        connection.is_crowded = len(self._open) > limit
        return len(self._open) <= limit + self.limits.probe_connections

    def close(self, connection: "GuardedProtocol") -> None:
        """Remove a connection."""
        self._open.discard(connection)
        self._silent.pop(connection, None)

    def set_silent(self, connection: "GuardedProtocol", is_silent: bool) -> None:
        """Record whether a connection is waiting for a request."""
        if not is_silent:
            self._silent.pop(connection, None)
        elif connection in self._open:
            self._silent.setdefault(connection)


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol, with timeouts on request headers and on clients that stop reading.

    Attributes:
        guarded: All connections of the server; see `protocol`.
        is_crowded: Whether this connection only answers health probes.
        was_answered: Whether it has had a complete answer.
    """

    guarded: ClassVar[Connections]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(HEAD_BYTES)
        self.is_crowded = self.was_answered = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept the connection if the limits allow it."""
        super().connection_made(transport)
        if not self.guarded.open(self):
            transport.abort()
            return
        # asyncio does not do so for a listener that was made without a protocol number. An answer's
        # body would wait 40 ms until the client acknowledges the headers.
        made = transport.get_extra_info("socket")
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.is_crowded:
            self.app_state = {**self.app_state, _IS_CROWDED: True}
        self._update_header_timer(has_begun=True)

    def has_unread_bytes(self) -> bool:
        """Return whether the system has bytes of the client that `data_received` has not got."""
        count = array("i", [0])
        with suppress(OSError):  # the connection is closed
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
        return count[0] > 0

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection and cancel its timers."""
        self.guarded.close(self)
        self._header_timer, self._write_timer = (
            _cancelled(self._header_timer),
            _cancelled(self._write_timer),
        )
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process received bytes, and update the header timer."""
        super().data_received(data)
        self._update_header_timer(has_begun=True)

    def on_response_complete(self) -> None:
        """Mark the connection as silent until the next request."""
        super().on_response_complete()
        self.was_answered = True
        self._update_header_timer(has_begun=False)

    def pause_writing(self) -> None:
        """Start the timeout for a client that stops reading its answer."""
        super().pause_writing()
        seconds = self.guarded.limits.body_seconds
        self._write_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Cancel the timeout, since the client reads again."""
        super().resume_writing()
        self._write_timer = _cancelled(self._write_timer)

    def _update_header_timer(self, *, has_begun: bool) -> None:
        """Start the header timeout when a request begins; cancel it after the headers."""
        is_silent = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        self.guarded.set_silent(self, is_silent)
        if not is_silent:
            self._header_timer = _cancelled(self._header_timer)
        elif has_begun and self._header_timer is None:
            seconds = self.guarded.limits.header_seconds
            self._header_timer = self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        """Close a connection whose headers timed out; answer 408 if a request had begun."""
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE:
            body = json.dumps(_SLOW.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            response = h11.Response(status_code=_SLOW.status, headers=headers)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol(limits: Limits) -> type[GuardedProtocol]:
    """Return a protocol class whose instances share one `Connections`."""
    return type("Connection", (GuardedProtocol,), {"guarded": Connections(limits)})


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, and return None to assign in its place."""
    if timer is not None:
        timer.cancel()
    return None
