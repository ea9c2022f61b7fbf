"""One log line per request, and request ids in answers. No line can delay a request."""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from logratio.serving.config import LogFormat
from logratio.serving.connections import PROBES, App, Message, Receive, Send, refuse
from logratio.serving.limits import RefusedError
from logratio.serving.request_record import RequestRecord, begin, is_open_inference, usable_id
from logratio.serving.tracing import Tracing

METRICS = "/metrics"
_METHODS = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"}
_STDERR = 2
_CAPACITY = 10_000
_INTERNAL = RefusedError(500, "internal", "the request could not be answered")


class LineWriter:
    """Writes lines in a separate thread, so that a full pipe or a slow disk delays nothing.

    Attributes:
        dropped: Number of lines that were not written, because too many were waiting.
    """

    def __init__(self, descriptor: int = _STDERR, capacity: int = _CAPACITY) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._write, name="logratio-log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Add a line to the queue, or drop it if the queue is full."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Write the lines that are waiting, for a limited time in seconds."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(seconds)

    def _write(self) -> None:
        # Not sys.stderr: at exit, Python waits for its lock, which a blocked thread would hold.
        while (line := self._lines.get()) is not None:
            rest = line.encode(errors="backslashreplace") + b"\n"
            with suppress(OSError):
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]


class Log(logging.Handler):
    """Formats log lines: of requests, and of the libraries without the text of their exceptions."""

    def __init__(self, writer: LineWriter, log_format: LogFormat) -> None:
        super().__init__()
        self._writer, self._format = writer, log_format

    @property
    def dropped(self) -> int:
        """Number of lines that were not written, because too many were waiting."""
        return self._writer.dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record of `logging`; an exception's own text could hold a request's."""
        error = record.exc_info[0] if record.exc_info else None
        values = {"level": record.levelname.lower(), "message": record.getMessage()}
        if error is not None:
            values["error"] = error.__name__
        self._add(values, f"{record.getMessage()}{f' ({error.__name__})' if error else ''}")

    def request(self, record: RequestRecord, seconds: float) -> None:
        """Write the line of a request that took `seconds`."""
        if self._format == "off":
            return
        times = {phase: round(1e3 * value, 3) for phase, value in record.seconds.items()}
        values: dict[str, Any] = {"level": "error" if record.error else "info", "id": record.id}
        values |= {"method": record.method, "route": record.route, "status": record.status}
        values |= {"cause": record.cause, "error": record.error}
        values |= {"ms": times | {"total": round(1e3 * seconds, 3)}}
        values |= {"prompt_tokens": record.prompt_tokens}
        values |= {"candidate_tokens": record.candidate_tokens}
        shown = {name: value for name, value in values.items() if value is not None}
        self._add(shown, _text(record, seconds))

    def _add(self, values: dict[str, Any], text: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        is_json = self._format == "json"
        self._writer.write(json.dumps({"time": now} | values) if is_json else f"{now} {text}")


def _text(record: RequestRecord, seconds: float) -> str:
    phases = ", ".join(f"{phase} {1e3 * value:.1f}" for phase, value in record.seconds.items())
    outcome = " ".join(str(one) for one in (record.status, record.cause, record.error) if one)
    line = f"{record.id} {record.method} {record.route} {outcome or 'client gone'} "
    line += f"{1e3 * seconds:.1f} ms" + (f" ({phases})" if phases else "")
    if not record.prompt_tokens:
        return line
    return f"{line} {record.prompt_tokens} prompt + {record.candidate_tokens} candidate tokens"


def _headers(record: RequestRecord) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers of an answer that come from its record."""
    yield b"x-request-id", record.id.encode()
    if record.digest is not None:
        yield b"x-bundle-digest", record.digest.encode()


class Observed:
    """ASGI middleware, the outermost: request ids, log, metrics, traces, and unexpected errors."""

    def __init__(
        self,
        app: App,
        log: Log | None,
        paths: frozenset[str],
        finished: Callable[[RequestRecord, float], None],
        tracing: Tracing | None = None,
    ) -> None:
        self._app, self._log, self._paths, self._finished = app, log, paths, finished
        self._tracing = tracing

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one HTTP request; pass other scopes to the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(id=usable_id(scope["headers"]))
        record.method = scope["method"] if scope["method"] in _METHODS else "other"
        record.has_text_errors = is_open_inference(scope["path"])
        begin(record)

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers(record)]
            await send(message)

        try:
            await self._app(scope, receive, identified)
        except Exception as error:
            # Not raised again: the server would log it with its text, which could hold content.
            record.error = type(error).__name__
            if not record.status:
                await refuse(identified, _INTERNAL)
        finally:
            self._finish(record, scope)

    def _finish(self, record: RequestRecord, scope: MutableMapping[str, Any]) -> None:
        """Log, count and trace a request; no error in here reaches its client."""
        seconds = time.perf_counter() - record.started
        path = getattr(scope.get("route"), "path", scope["path"])
        record.route = path if path in self._paths else "other"
        with suppress(Exception):
            self._finished(record, seconds)
        is_routine = record.route in PROBES or record.route == METRICS
        if is_routine and record.status == 200:
            return
        with suppress(Exception):
            if self._log is not None:
                self._log.request(record, seconds)
        with suppress(Exception):
            if self._tracing is not None:
                traceparent = dict(scope["headers"]).get(b"traceparent")
                self._tracing.finished(record, seconds, traceparent)
