"""Request ids, one log line per request, and that neither has content or delays a request."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from broken_reranker import BrokenReranker
from fastapi import FastAPI
from starlette.testclient import TestClient
from tiny_bundle import tiny_bundle

from logratio.serving import Reranker
from logratio.serving.access_log import METRICS, LineWriter, Log
from logratio.serving.config import LogFormat
from logratio.serving.connections import PROBES
from logratio.serving.keys import Keys
from logratio.serving.limits import Limits
from logratio.serving.page import PAGES
from logratio.serving.server import create_app

QUERY, DOCUMENTS = "the cat sits", ["on the mat happy", "sad"]
REQUEST = {"query": QUERY, "documents": DOCUMENTS}
CANARY = "xyzzy-canary"
KEY = "a-key-for-the-canary-test"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")


class Lines:
    """Takes the lines of a log in memory, in place of `LineWriter`."""

    def __init__(self) -> None:
        self.dropped = 0
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)

    @property
    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@contextmanager
def logged(
    reranker: Reranker, log_format: LogFormat = "json", **limits: Any
) -> Iterator[tuple[TestClient, Lines]]:
    lines: Any = Lines()
    app = create_app(reranker, Limits(**limits), log=Log(lines, log_format))
    with TestClient(app) as client:
        yield client, lines


def test_a_request_has_one_line_with_times_and_tokens(reranker: Reranker) -> None:
    with logged(reranker) as (client, lines):
        answer = client.post("/v1/rerank", json=REQUEST)
    (line,) = lines.json
    assert line["id"] == answer.headers["x-request-id"] == answer.json()["id"]
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/rerank", 200)
    usage = answer.json()["usage"]
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["candidate_tokens"] == usage["completion_tokens"]
    assert set(line["ms"]) == {"queue", "encode", "compute", "total"}
    assert line["ms"]["encode"] > 0 and line["ms"]["compute"] > 0
    parts = sum(value for phase, value in line["ms"].items() if phase != "total")
    assert parts <= line["ms"]["total"] + 0.01


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-1_2.3:4", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("two words", False),
        ('quote"d', False),
        ("", False),
    ],
)
def test_a_plain_request_id_is_kept_and_any_other_replaced(
    reranker: Reranker, given: str, is_kept: bool
) -> None:
    with logged(reranker) as (client, lines):
        for path in ("/v1/rerank", "/missing"):
            echoed = client.post(path, headers={"x-request-id": given}).headers["x-request-id"]
            assert (echoed == given) == is_kept
            assert 0 < len(echoed) <= 128
            assert lines.json[-1]["id"] == echoed


TENSORS = {
    "inputs": [
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [QUERY]},
        {"name": "candidates", "shape": [2], "datatype": "BYTES", "data": DOCUMENTS},
    ]
}
POSTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank", "/infinity/rerank"), REQUEST),
    "/v1/score": {"groups": [{"prompt": QUERY, "candidates": DOCUMENTS}]},
    "/v1/best_of": {"prompt": QUERY, "candidates": DOCUMENTS},
    "/score": {"text_1": QUERY, "text_2": DOCUMENTS},
    "/get_reward": {"query": [f"{QUERY} sad"], "prompts": [QUERY]},
    "/v2/models/{name}/infer": TENSORS,
    "/v2/models/{name}/versions/{version}/infer": TENSORS,
}
"""A request for each route that computes."""
GETS = (
    *("/v1/models", "/version", "/openapi.json", "/v2"),
    *("/v2/models/{name}", "/v2/models/{name}/versions/{version}"),
    *("/v2/models/{name}/ready", "/v2/models/{name}/versions/{version}/ready"),
)


def unmatched(path: str) -> str:
    """The label of a request to a route before it is matched: names in it are those of a client."""
    return "other" if "{" in path else path


def test_every_route_has_a_label_the_id_of_the_request_and_needs_a_key(
    reranker: Reranker,
) -> None:
    lines: Any = Lines()
    app = create_app(reranker, keys=Keys([KEY]), log=Log(lines, "json"))
    routes = {str(getattr(route, "path", "")) for route in app.routes}
    assert routes == {*POSTS, *GETS, *PROBES, METRICS, *PAGES}
    given = {"x-api-key": KEY, "x-request-id": "abc"}
    with TestClient(app) as client:
        for path in (*POSTS, *GETS):
            body = POSTS.get(path)
            method = "POST" if body else "GET"
            place = path.format(name=reranker.manifest.name, version=reranker.digest)
            assert client.request(method, place, json=body).status_code == 401
            answer = client.request(method, place, json=body, headers=given)
            assert answer.status_code == 200
            found = answer.json()
            assert answer.headers["x-request-id"] == "abc" == found.get("id", "abc")
            without, line = lines.json[-2:]
            # A request without a key is refused before its path is matched with the routes.
            assert (without["route"], line["route"]) == (unmatched(path), path)
            assert line["id"] == "abc"
            assert (line["prompt_tokens"] > 0) == ("compute" in line["ms"]) == bool(body)
        assert client.get(METRICS).status_code == 401
        metrics = client.get(METRICS, headers=given).text
    for path in (*POSTS, *GETS):
        for route, status in ((path, 200), (unmatched(path), 401)):
            assert f'logratio_requests_total{{route="{route}",status="{status}"}}' in metrics


def test_an_error_has_its_id_and_its_cause(reranker: Reranker) -> None:
    with logged(reranker, body_bytes=200) as (client, lines):
        answers = [
            client.post("/v1/rerank", json={"query": QUERY}),
            client.post("/v1/rerank", content=b" " * 201),
            client.get(f"/{CANARY}"),
            client.request("XYZZY", "/v1/rerank"),
        ]
    assert [line["cause"] for line in lines.json] == [
        *("malformed", "body_too_large", "not_found", "method"),
    ]
    assert [line["route"] for line in lines.json][2] == "other"
    assert lines.json[3]["method"] == "other"
    assert [answer.headers["x-request-id"] for answer in answers] == [
        line["id"] for line in lines.json
    ]


def test_routine_probes_have_no_line_and_refused_ones_do(reranker: Reranker) -> None:
    with logged(reranker) as (client, lines):
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        assert not lines.lines
        app: Any = client.app
        app.state.server.draining = True
        assert client.get("/readyz").status_code == 503
    assert [line["cause"] for line in lines.json] == ["draining"]


def test_the_text_format_has_the_same_facts(reranker: Reranker) -> None:
    with logged(reranker, "text") as (client, lines):
        number = client.post("/v1/rerank", json=REQUEST).headers["x-request-id"]
        client.post("/v1/rerank", json={})
    assert f" {number} POST /v1/rerank 200 " in lines.lines[0]
    assert "compute" in lines.lines[0] and lines.lines[0].endswith("candidate tokens")
    assert " 422 malformed " in lines.lines[1]


def test_no_lines_of_requests_if_the_log_is_off(reranker: Reranker) -> None:
    with logged(reranker, "off") as (client, lines):
        assert client.post("/v1/rerank", json=REQUEST).headers["x-request-id"]
    assert not lines.lines


def canaries() -> Iterator[dict[str, Any]]:
    """Requests with the canary in every part."""
    yield {"json": {"query": CANARY, "documents": [CANARY, f"{CANARY} sad"]}}
    yield {"json": {"query": QUERY, "documents": [""], "model": CANARY}}
    yield {"json": {"query": [{"role": CANARY, "content": CANARY}], "documents": ["a"]}}
    yield {"json": {"query": QUERY, "documents": [{CANARY: CANARY}]}}
    yield {"json": {"query": QUERY, "documents": "x", CANARY: CANARY}}
    yield {"content": f'{{"query": "{CANARY}"'.encode()}
    yield {"json": REQUEST, "params": {CANARY: CANARY}}
    for name in ("authorization", "x-api-key", "user-agent", "cookie", "referer", "origin", CANARY):
        yield {"json": REQUEST, "headers": {name: f"Bearer {CANARY}"}}
    yield {"json": REQUEST, "headers": {"x-request-id": f"{CANARY} " * 2}}
    yield {"content": b"{}", "headers": {"content-type": CANARY}}


def test_a_canary_in_every_part_appears_in_no_log_metric_or_error(
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_bundle(tmp_path_factory) / "bundle"
    lines: Any = Lines()
    errors = []
    with caplog.at_level(logging.DEBUG):
        for kind in (Reranker, BrokenReranker):
            for keys in (None, Keys([KEY])):
                log = Log(lines, "json")
                app: FastAPI = create_app(kind.load(folder), keys=keys, log=log)
                with TestClient(app) as client:
                    for path in ("/v1/rerank", "/infinity/rerank", f"/{CANARY}"):
                        for request in canaries():
                            answer = client.post(path, **request)
                            errors += [answer.text, str(answer.headers)]
                    allowed = {"authorization": f"Bearer {KEY}"}
                    metrics = client.get("/metrics", headers=allowed).text
                    assert "logratio_requests_total{" in metrics
                    errors.append(metrics)
    assert len(lines.lines) == 4 * 3 * len([*canaries()])
    assert {line["status"] for line in lines.json} >= {200, 401, 404, 422, 500}
    failed = [line for line in lines.json if line["status"] == 500]
    assert {(line["level"], line["error"]) for line in failed} == {("error", "RuntimeError")}
    records = [r.getMessage() for r in caplog.records if not r.name.startswith("httpx")]
    everything = "".join([*errors, *lines.lines, *records, *capfd.readouterr()])
    assert CANARY not in everything
    assert KEY not in everything


def test_an_exception_outside_of_scoring_is_answered_and_logged_by_its_class(
    reranker: Reranker, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: Any = Lines()
    app = create_app(reranker, log=Log(lines, "json"))

    @app.get("/broken")
    async def broken() -> None:
        raise ValueError(CANARY)

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/broken")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert answer.headers["x-request-id"] == lines.json[0]["id"]
    assert lines.json[0]["error"] == "ValueError"
    assert CANARY not in "".join([answer.text, *lines.lines, *capfd.readouterr()])


def test_lines_of_libraries_have_no_text_of_exceptions() -> None:
    lines: Any = Lines()
    logger = logging.Logger("uvicorn.error")
    logger.addHandler(Log(lines, "json"))
    try:
        raise ValueError(CANARY)
    except ValueError:
        logger.exception("an exception in %s", "the application")
    (line,) = lines.json
    assert line["message"] == "an exception in the application"
    assert line["error"] == "ValueError"
    assert CANARY not in lines.lines[0]


def test_a_full_pipe_drops_lines_and_delays_nothing() -> None:
    reading, writing = os.pipe()
    try:
        writer = LineWriter(writing, capacity=10)
        start = time.monotonic()
        for number in range(10_000):
            writer.write(f"{number:0100d}")  # 1 MB; nobody reads the pipe
        writer.close(0.1)
        assert time.monotonic() - start < 5
        assert writer.dropped > 0
        first = os.read(reading, 101).decode()
        assert first == f"{0:0100d}\n"
    finally:
        os.close(reading)  # ends the write that is blocked
        os.close(writing)


def test_lines_are_written_before_the_end(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb", buffering=0) as file:
        writer = LineWriter(file.fileno())
        for number in range(100):
            writer.write(str(number))
        writer.close()
    assert (tmp_path / "log").read_text().split() == [str(number) for number in range(100)]
