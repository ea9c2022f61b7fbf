"""Traces with OpenTelemetry: a span for each request and its phases, without content of requests.

Needs opentelemetry-sdk. Spans are made when a request has been answered, and sent by a thread of
the SDK, so a collector that is slow or dead delays no request.
"""

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from logratio import __version__
from logratio.errors import ConfigError
from logratio.extras import require
from logratio.serving.request_record import RequestRecord

EXTRA = "otel"
_SERVICE = "logratio"
_PROTOCOL = "http/protobuf"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_CLOSE_SECONDS = 1.0


class Tracing:
    """Makes the spans of requests."""

    def __init__(self, provider: Any) -> None:
        """Take the tracer of a provider.

        Args:
            provider: An ``opentelemetry.sdk.trace.TracerProvider``.

        Raises:
            MissingExtraError: opentelemetry is not installed.
        """
        self._api = require("opentelemetry.trace", EXTRA)
        propagation = require("opentelemetry.trace.propagation.tracecontext", EXTRA)
        self._parents = propagation.TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("logratio.serving", __version__)

    def finished(self, record: RequestRecord, seconds: float, traceparent: bytes | None) -> None:
        """Make the spans of a request that took `seconds`.

        Args:
            record: The request.
            seconds: Time from its arrival to the end of its answer.
            traceparent: The header of this name, which has the ids of the client's span.
        """
        # Not the header `tracestate`: clients choose its text.
        carrier = {} if traceparent is None else {"traceparent": traceparent.decode("latin-1")}
        ended = time.time_ns()
        span = self._tracer.start_span(
            record.method if record.route == "other" else f"{record.method} {record.route}",
            context=self._parents.extract(carrier),
            kind=self._api.SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=ended - _nanoseconds(seconds),
        )
        if record.status >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        after_scoring = record.started + seconds - record.scored
        start = ended - _nanoseconds(after_scoring + record.scoring_seconds)
        inside = self._api.set_span_in_context(span)
        for phase, length in record.seconds.items():
            child = self._tracer.start_span(phase, context=inside, start_time=start)
            start += _nanoseconds(length)
            child.end(start)
        span.end(ended)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Send the spans that are waiting, for a limited time in seconds."""
        # The SDK's own limit does not end a request to a collector that never answers.
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(seconds)


def _attributes(record: RequestRecord) -> dict[str, str | int]:
    """Return the attributes of a request's span: OpenTelemetry's conventions, and logratio's."""
    values: dict[str, str | int | None] = {
        "http.request.method": record.method if record.method != "other" else "_OTHER",
        "http.route": record.route if record.route != "other" else None,
        "http.response.status_code": record.status or None,  # none: the client left first
        "error.type": (record.error or record.cause) if record.status >= 500 else None,
        "logratio.request.id": record.id,
        "logratio.cause": record.cause,
        "logratio.bundle.digest": record.digest,
        "logratio.prompt_tokens": record.prompt_tokens or None,
        "logratio.candidate_tokens": record.candidate_tokens or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)


def check_protocol(environment: Mapping[str, str] = os.environ) -> None:
    """Check what `otlp_tracing` needs, before the bundle is loaded.

    Raises:
        MissingExtraError: opentelemetry is not installed.
        ConfigError: A variable asks for another protocol than OTLP over HTTP.
    """
    require("opentelemetry.sdk.trace", EXTRA)
    require("opentelemetry.exporter.otlp.proto.http.trace_exporter", EXTRA)
    for name in _PROTOCOLS:
        if environment.get(name, _PROTOCOL) != _PROTOCOL:
            raise ConfigError(
                f"{name} is {environment[name]!r}, and traces are sent as {_PROTOCOL} only: remove "
                "the variable, and give the collector's port for HTTP, usually 4318"
            )


def otlp_tracing() -> Tracing:
    """Return a tracing that sends spans to a collector, as the variables OTEL_… choose.

    Raises:
        MissingExtraError, ConfigError: As `check_protocol`.
    """
    check_protocol()
    sdk = require("opentelemetry.sdk.trace", EXTRA)
    resources = require("opentelemetry.sdk.resources", EXTRA)
    exporter = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", EXTRA)
    export = require("opentelemetry.sdk.trace.export", EXTRA)
    named = resources.OTELResourceDetector().detect().attributes
    resource = {"service.name": _SERVICE, "service.version": __version__} | dict(named)
    provider = sdk.TracerProvider(
        resource=resources.Resource.create(resource),
        shutdown_on_exit=False,  # it would wait for the collector
    )
    provider.add_span_processor(export.BatchSpanProcessor(exporter.OTLPSpanExporter()))
    return Tracing(provider)
