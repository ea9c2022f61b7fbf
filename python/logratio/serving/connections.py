"""Connections: bounded in number and in time, with room for health probes. Needs uvicorn."""

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from logratio.serving.body import App, Receive, Send, refuse
from logratio.serving.limits import Limits
from logratio.serving.refusals import RefusedError

PROBES = frozenset({"/livez", "/readyz"})
_CROWDED = RefusedError(503, "connections", "too many connections are open")
_SLOW = RefusedError(408, "slow_header", "the request took too long to begin")


class Connections:
    """What is open, and what of it is silent: nothing has come that could be answered."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: set[GuardedProtocol] = set()
        self._silent: dict[GuardedProtocol, None] = {}  # in the order in which they fell silent

    def open(self, connection: "GuardedProtocol") -> bool:
        """Take a new connection in; where there is no room, one that is silent makes it.

        Returns:
            Whether it may stay.
        """
        limit = self.limits.connections
        if len(self._open) >= limit and self._silent:
            oldest = next(iter(self._silent))
            self.close(oldest)
            oldest.transport.abort()
        self._open.add(connection)
        connection.is_crowded = len(self._open) > limit
        return len(self._open) <= limit + self.limits.probe_connections

    def close(self, connection: "GuardedProtocol") -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._silent.pop(connection, None)

    def set_silent(self, connection: "GuardedProtocol", is_silent: bool) -> None:
        """Note whether a connection waits for a request."""
        if not is_silent:
            self._silent.pop(connection, None)
        elif connection in self._open:
            self._silent.setdefault(connection)


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol, with a time limit on heads and on pauses in reading the answer.

    Attributes:
        guarded: All connections of the server; see `protocol`.
        is_crowded: Whether only probes are answered here.
    """

    guarded: ClassVar[Connections]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_crowded = False
        self._head: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, if there is room."""
        super().connection_made(transport)
        if not self.guarded.open(self):
            transport.abort()
            return
        if self.is_crowded:
            self.app = _probes_only(self.app)
        self._look(has_begun=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self.guarded.close(self)
        self._head, self._pause = _cancelled(self._head), _cancelled(self._pause)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._look(has_begun=True)

    def on_response_complete(self) -> None:
        """Wait for the next request, for as long as a silent connection may."""
        super().on_response_complete()
        self._look(has_begun=False)

    def pause_writing(self) -> None:
        """Give a client that does not read its answer some time."""
        super().pause_writing()
        seconds = self.guarded.limits.body_seconds
        self._pause = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on with a client that reads again."""
        super().resume_writing()
        self._pause = _cancelled(self._pause)

    def _look(self, *, has_begun: bool) -> None:
        """Start the clock of a head when it begins; stop it when it has come."""
        is_silent = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        self.guarded.set_silent(self, is_silent)
        if not is_silent:
            self._head = _cancelled(self._head)
        elif has_begun and self._head is None:
            seconds = self.guarded.limits.header_seconds
            self._head = self.loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        """Close a connection whose request has not come; say so if it had begun."""
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
    """Make the class of a server's connections."""
    return type("Connection", (GuardedProtocol,), {"guarded": Connections(limits)})


def _probes_only(app: Any) -> App:
    async def answer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await app(scope, receive, send)
        else:
            await refuse(send, _CROWDED)

    return answer


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, and return what takes its place: nothing."""
    if timer is not None:
        timer.cancel()
    return None
