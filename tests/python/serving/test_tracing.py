"""Traces: a span per request with its phases, no content, and a collector that delays nothing."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from broken_reranker import BrokenReranker
from running_server import running
from starlette.testclient import TestClient
from tiny_bundle import tiny_bundle

from logratio.errors import ConfigError
from logratio.extras import require
from logratio.serving import Reranker
from logratio.serving.limits import Limits
from logratio.serving.server import create_app
from logratio.serving.tracing import Tracing, check_protocol

REQUEST = {"query": "the cat sits", "documents": ["on the mat happy", "sad"]}
CANARY = "xyzzy-canary"
TRACE, PARENT = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
PHASES = {"queue", "encode", "compute"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder)


@contextmanager
def traced(reranker: Reranker, **limits: Any) -> Iterator[tuple[TestClient, Any]]:
    """A client, and the exporter in memory that gets the spans."""
    sdk = require("opentelemetry.sdk.trace", "otel")
    export = require("opentelemetry.sdk.trace.export", "otel")
    memory = require("opentelemetry.sdk.trace.export.in_memory_span_exporter", "otel")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    app = create_app(reranker, Limits(**limits), tracing=Tracing(provider))
    with TestClient(app) as client:
        yield client, exporter


def split(spans: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The span of a request, and those of its phases."""
    (server,) = [span for span in spans if span.name not in PHASES]
    return server, [span for span in spans if span is not server]


def test_a_request_is_a_span_with_the_conventional_attributes(reranker: Reranker) -> None:
    with traced(reranker) as (client, exporter):
        answer = client.post("/v1/rerank", json=REQUEST, headers={"x-request-id": "one"})
        server, _ = split(exporter.get_finished_spans())
    usage = answer.json()["usage"]
    assert (server.name, server.kind.name) == ("POST /v1/rerank", "SERVER")
    assert dict(server.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/rerank",
        "http.response.status_code": 200,
        "logratio.request.id": "one",
        "logratio.bundle.digest": reranker.digest,
        "logratio.prompt_tokens": usage["prompt_tokens"],
        "logratio.candidate_tokens": usage["completion_tokens"],
    }
    assert server.parent is None
    assert server.status.status_code.name == "UNSET"


def test_the_phases_follow_each_other_inside_the_request(reranker: Reranker) -> None:
    before = time.time_ns()
    with traced(reranker) as (client, exporter):
        client.post("/v1/rerank", json=REQUEST)
        server, phases = split(exporter.get_finished_spans())
    assert [span.name for span in phases] == ["queue", "encode", "compute"]
    assert {span.parent.span_id for span in phases} == {server.context.span_id}
    assert {span.context.trace_id for span in phases} == {server.context.trace_id}
    times = [
        server.start_time,
        *(time for span in phases for time in (span.start_time, span.end_time)),
    ]
    # Each time is rounded to a nanosecond on a clock of its own.
    assert all(later - earlier > -1000 for earlier, later in pairwise(times))
    assert before <= server.start_time < server.end_time <= time.time_ns()
    assert phases[-1].end_time <= server.end_time
    assert phases[2].end_time > phases[2].start_time


def test_the_span_continues_the_trace_of_the_client(reranker: Reranker) -> None:
    with traced(reranker) as (client, exporter):
        header = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01"}
        client.post("/v1/rerank", json=REQUEST, headers=header)
        server, phases = split(exporter.get_finished_spans())
        assert (server.context.trace_id, server.parent.span_id) == (TRACE, PARENT)
        assert len(phases) == 3
        exporter.clear()
        unsampled = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-00"}
        client.post("/v1/rerank", json=REQUEST, headers=unsampled)
        assert not exporter.get_finished_spans()  # the client decided that
        for wrong in ("nonsense", "00-" + "0" * 32 + f"-{PARENT:016x}-01", "é"):
            exporter.clear()
            client.post("/v1/rerank", json=REQUEST, headers={b"traceparent": wrong.encode()})
            assert split(exporter.get_finished_spans())[0].parent is None


def test_errors_have_their_cause_and_only_those_of_the_server_are_failures(
    folder: Path, reranker: Reranker
) -> None:
    with traced(reranker) as (client, exporter):
        client.post("/v1/rerank", json={})
        (refused,) = exporter.get_finished_spans()
        assert refused.attributes["logratio.cause"] == "malformed"
        assert "error.type" not in refused.attributes
        assert refused.status.status_code.name == "UNSET"
    with traced(BrokenReranker.load(folder)) as (client, exporter):
        assert client.post("/v1/rerank", json=REQUEST).status_code == 500
        failed, _ = split(exporter.get_finished_spans())
    assert failed.status.status_code.name == "ERROR"
    assert failed.attributes["error.type"] == "RuntimeError"
    assert failed.status.description is None


def test_probes_and_scrapes_are_not_traced(reranker: Reranker) -> None:
    with traced(reranker) as (client, exporter):
        for path in ("/livez", "/readyz", "/health", "/metrics"):
            assert client.get(path).status_code == 200
        assert not exporter.get_finished_spans()


def test_no_text_of_a_request_is_in_a_span(reranker: Reranker) -> None:
    with traced(reranker, document_characters=100) as (client, exporter):
        headers = {
            name: f"{CANARY}=1" if name == "tracestate" else CANARY
            for name in ("user-agent", "tracestate", "baggage", "authorization", "cookie")
        } | {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01", "x-request-id": f"{CANARY} !"}
        texts = {"query": f"the cat {CANARY}", "documents": [CANARY, "sad"], CANARY: CANARY}
        client.post("/v1/rerank", json=texts, headers=headers)
        client.post("/v1/rerank", json=texts | {"documents": CANARY}, headers=headers)
        client.post("/v1/rerank", content=CANARY, headers=headers)
        client.get(f"/{CANARY}?{CANARY}={CANARY}", headers=headers)
        client.request(CANARY, "/v1/rerank", headers=headers)
        spans = exporter.get_finished_spans()
    assert len([span for span in spans if span.name not in PHASES]) == 5
    assert CANARY not in "".join(span.to_json() for span in spans)
    assert not [span for span in spans if len(span.context.trace_state)]


@pytest.mark.parametrize(
    "name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"]
)
def test_another_protocol_is_refused(name: str) -> None:
    check_protocol({name: "http/protobuf"})
    with pytest.raises(ConfigError, match=f"{name} is 'grpc'.*4318"):
        check_protocol({name: "grpc"})


def test_the_protocol_is_checked_before_the_bundle_is_read() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "logratio", "serve", "--bundle", "nowhere", "--otel"],
        env=os.environ | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "OTEL_EXPORTER_OTLP_PROTOCOL" in done.stderr


def rerank(port: int) -> float:
    """Send a request that must succeed; return its time in seconds."""
    start = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/rerank", json.dumps(REQUEST), headers)
    assert connection.getresponse().status == 200
    connection.close()
    return time.monotonic() - start


class Collector(BaseHTTPRequestHandler):
    """Takes spans, as a collector for OTLP over HTTP."""

    bodies: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def collector() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_collector_gets_the_spans_that_wait_at_the_stop(
    folder: Path, collector: HTTPServer
) -> None:
    Collector.bodies.clear()
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=tests",
    }
    with running(folder, "--otel", **variables) as (process, port):
        rerank(port)
        process.send_signal(signal.SIGTERM)  # the batch of the SDK is sent after five seconds
        assert process.wait(20) == 0
    proto = require("opentelemetry.proto.collector.trace.v1.trace_service_pb2", "otel")
    ((path, body),) = Collector.bodies
    assert path == "/v1/traces"
    (found,) = proto.ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {one.key: one.value.string_value for one in found.resource.attributes}
    assert resource["service.name"] == "logratio"
    assert resource["deployment.environment.name"] == "tests"
    names = {span.name for scope in found.scope_spans for span in scope.spans}
    assert names == {"POST /v1/rerank"} | PHASES


def test_a_collector_that_never_answers_delays_neither_requests_nor_the_stop(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_BSP_MAX_QUEUE_SIZE": "8",  # full from the third request on
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4",
        }
        with running(folder, "--otel", **variables) as (process, port):
            rerank(port)
            silent.settimeout(20)
            accepted, _ = silent.accept()
            with accepted:
                assert accepted.recv(16).startswith(b"POST /v1/traces")
                assert max(rerank(port) for _ in range(20)) < 2
                start = time.monotonic()
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                assert time.monotonic() - start < 5  # the exporter's own limit is ten seconds
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
