"""Request bodies: bounded, in time, whole before anything parses them."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from logratio.errors import LogratioError
from logratio.serving.limits import Limits
from logratio.serving.refusals import RefusedError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class ClientGoneError(LogratioError):
    """The client closed the connection before its request was complete."""


class BoundedBody:
    """ASGI middleware that reads the body up to a limit and drops work of clients that leave."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one request (or pass on what is none)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _read(scope, receive, self._limits.body_bytes)
        except ClientGoneError:
            return
        except TimeoutError:
            await refuse(send, RefusedError(408, "slow_body", "the request took too long"))
        except RefusedError as error:
            await refuse(send, error)
        else:
            await _answer(self._app, scope, body, receive, send)


async def _read(scope: MutableMapping[str, Any], receive: Receive, limit: int) -> bytes:
    """Collect a body, counting bytes as they come: chunked requests state no length."""
    too_large = RefusedError(413, "body_too_large", f"a request may have {limit:,} bytes")
    stated = dict(scope["headers"]).get(b"content-length", b"0")
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
    """Let `app` answer, unless the client leaves first."""
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


async def refuse(send: Send, error: RefusedError) -> None:
    """Answer before the body was read; what is left of it ends the connection."""
    content = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
        *((name.lower().encode(), value.encode()) for name, value in error.headers().items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
