"""The rerank API: format, order, limits, and no request text in errors or logs."""

import gzip
import http.client
import json
import logging
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from broken_reranker import BrokenReranker
from failing_session import failing
from fastapi import FastAPI
from running_server import running
from starlette.testclient import TestClient
from tiny_bundle import BETA, copy_bundle, tiny_bundle, with_template

from logratio.extras import MissingExtraError
from logratio.serving import Reranker
from logratio.serving.candidates import READING, CandidateGroup, Prompt, Reading
from logratio.serving.connections import PROBES
from logratio.serving.limits import Limits
from logratio.serving.server import create_app

QUERY = "the cat sits"
DOCUMENTS = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
CANARY = "xyzzy-canary"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder)


@pytest.fixture
def client(reranker: Reranker) -> Iterator[TestClient]:
    with client_of(reranker) as client:
        yield client


@contextmanager
def client_of(reranker: Reranker, **limits: Any) -> Iterator[TestClient]:
    with TestClient(create_app(reranker, Limits(**limits))) as client:
        yield client


def refused(client: TestClient, status: int, code: str, **request: Any) -> str:
    """Send a request that must be refused, and return the message."""
    response = client.post("/v1/rerank", **request)
    body = response.json()
    assert (response.status_code, body["error"]["code"]) == (status, code)
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}
    return str(body["error"]["message"])


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_answer_has_the_shape_and_the_order_of_the_reranker(
    client: TestClient, reranker: Reranker, path: str
) -> None:
    request = {"model": "rerank-any", "query": QUERY, "documents": DOCUMENTS}
    body = client.post(path, json=request).json()
    expected = reranker.rank(QUERY, DOCUMENTS)
    assert body.pop("id")
    assert abs(body.pop("created") - time.time()) < 60
    assert body == {
        "object": "rerank",
        "model": reranker.manifest.name,
        "results": [{"index": score.index, "relevance_score": score.reward} for score in expected],
        "meta": {"beta": BETA, "truncated_query": False},
        "usage": {"prompt_tokens": 4, "completion_tokens": 18, "total_tokens": 22},
    }


def test_documents_may_be_objects_and_are_returned_on_request(
    client: TestClient, reranker: Reranker
) -> None:
    request = {
        "query": QUERY,
        "documents": [{"text": DOCUMENTS[0]}, *DOCUMENTS[1:]],
        "return_documents": True,
        "top_n": 2,
    }
    results = client.post("/v1/rerank", json=request).json()["results"]
    assert [result["index"] for result in results] == [
        score.index for score in reranker.rank(QUERY, DOCUMENTS)[:2]
    ]
    assert all(result["document"] == {"text": DOCUMENTS[result["index"]]} for result in results)


def test_ties_go_to_the_lowest_index(client: TestClient) -> None:
    request = {"query": QUERY, "documents": ["sad"] * 3, "top_n": 9}
    results = client.post("/v1/rerank", json=request).json()["results"]
    assert [result["index"] for result in results] == [0, 1, 2]
    assert len({result["relevance_score"] for result in results}) == 1


def test_chat_turns_need_and_use_the_bundles_template(
    client: TestClient, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    request = {"query": [{"role": "user", "content": "the cat"}], "documents": ["sad", "sits"]}
    assert "E401" in refused(client, 422, "query", json=request)
    bundle = copy_bundle(tmp_path_factory, tmp_path / "bundle")
    template = (
        "{% for m in messages %}{% if 'xyzzy' in m['content'] %}{{ raise_exception(m['content']) }}"
        "{% endif %}{{ m['content'] }} {% endfor %}"
    )
    with client_of(Reranker.load(with_template(bundle, template))) as chats:
        assert chats.post("/v1/rerank", json=request).status_code == 200
        # A template may quote the chat: its message must not appear in the answer.
        request = {"query": [{"role": "user", "content": CANARY}], "documents": ["sad"]}
        message = refused(chats, 422, "query", json=request)
        assert message == "[E403] turns whose roles do not form a prompt and an answer"


def test_liveness_and_readiness_are_separate(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_stopping_server_is_not_ready(reranker: Reranker) -> None:
    app: FastAPI = create_app(reranker)
    with TestClient(app) as client:
        app.state.server.draining = True
        response = client.get("/readyz")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert client.get("/livez").status_code == 200
        refused(client, 503, "draining", json={"query": QUERY, "documents": DOCUMENTS})


def test_openapi_describes_the_score(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert {"/v1/rerank", "/v2/rerank", "/rerank", "/livez", "/readyz"} < set(schema["paths"])
    assert "never across queries" in json.dumps(schema["paths"]["/v1/rerank"])
    assert "never across queries" in schema["info"]["description"]
    assert client.get("/redoc").status_code == 404  # it would load scripts from other sites


def test_no_cross_origin_headers(client: TestClient) -> None:
    origin = {"origin": "http://elsewhere.example"}
    assert "access-control-allow-origin" not in client.get("/livez", headers=origin).headers
    assert client.options("/v1/rerank", headers=origin).status_code == 405


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"query": "a"}',
        b'{"query": 3, "documents": ["a"]}',
        b'{"query": "a", "documents": "a"}',
        b'{"query": "a", "documents": [3]}',
        b'{"query": "a", "documents": [{"body": "a"}]}',
        b'{"query": "a", "documents": ["b"], "top_n": 0}',
        b'{"query": "\\ud800", "documents": [3]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"query": "a", "documents": ["b"], "top_n": ' + b"9" * 5000 + b"}",
    ],
)
def test_malformed_requests_are_refused(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/rerank", content=content, headers=JSON)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["code"] == "malformed"


def test_lone_surrogates_are_refused(client: TestClient) -> None:
    for content in (
        b'{"query": "\\ud800", "documents": ["a"]}',
        b'{"query": "a", "documents": ["\\udfff"]}',
    ):
        response = client.post("/v1/rerank", content=content, headers=JSON)
        assert response.status_code == 422


def test_a_body_at_the_limit_is_accepted_and_one_byte_more_is_not(reranker: Reranker) -> None:
    body = json.dumps({"query": QUERY, "documents": ["sad"]}).encode()
    with client_of(reranker, body_bytes=len(body)) as client:
        assert client.post("/v1/rerank", content=body, headers=JSON).status_code == 200
        message = refused(client, 413, "body_too_large", content=body + b" ", headers=JSON)
        assert message == f"the limit is {len(body)} bytes per request"
        chunked = (body[i : i + 1] for i in range(len(body)))
        assert client.post("/v1/rerank", content=chunked, headers=JSON).status_code == 200
        longer = iter([body, b" "])  # has no Content-Length
        refused(client, 413, "body_too_large", content=longer, headers=JSON)


def test_documents_at_the_limits_are_accepted_and_more_are_not(reranker: Reranker) -> None:
    limits = {"documents": 3, "document_characters": 8, "query_characters": 7}
    with client_of(reranker, document_tokens=3, **limits) as client:

        def status(query: object, documents: list[str]) -> tuple[int, str]:
            response = client.post("/v1/rerank", json={"query": query, "documents": documents})
            return response.status_code, response.json().get("error", {}).get("code", "")

        assert status("the cat", ["a", "b", "sad"]) == (200, "")
        assert status("the cat", ["a", "b", "c", "d"]) == (422, "too_many_documents")
        assert status("the cat", []) == (422, "no_documents")
        assert status("the cat", ["12345678"]) == (200, "")
        assert status("the cat", ["123456789"]) == (422, "document")
        assert status("the cats", ["sad"]) == (422, "query")
        assert status([{"role": "user", "content": "the cats"}], ["sad"]) == (422, "query")
        assert status("the cat", ["a b"]) == (200, "")  # with EOS
        assert status("the cat", ["a b c"]) == (422, "document")


def test_a_document_that_cannot_be_scored_has_an_error(
    client: TestClient, reranker: Reranker
) -> None:
    documents = ["sad", " ", "happy", "sad " * 600]
    request = {"query": QUERY, "documents": documents, "truncate": True}
    truncated = {
        result["index"]: result
        for result in client.post("/v1/rerank", json=request).json()["results"]
    }
    assert [index for index in truncated if "truncated" in truncated[index]] == [3]
    cutting = reranker.score_groups(
        [reranker.encode(QUERY, documents, reading=Reading(truncate=True))]
    )[0]
    assert truncated[3]["relevance_score"] == cutting[3].reward
    assert truncated.keys() == {0, 2, 3}
    answer = client.post("/v1/rerank", json={"query": QUERY, "documents": documents}).json()
    expected = [(s.index, s.reward) for s in reranker.rank(QUERY, documents) if s.error is None]
    found = [(result["index"], result["relevance_score"]) for result in answer["results"]]
    assert found == expected
    assert answer["errors"] == [
        {"index": 1, "code": "document", "message": "[R301] an empty completion"},
        {"index": 3, "code": "document", "message": "601 tokens; the prompt leaves 508 of 512"},
    ]
    none = {"query": QUERY, "documents": ["", " "]}
    message = refused(client, 422, "document", json=none)
    assert message == "no document can be scored; document 0: [R301] an empty completion"
    prompt = {"query": "sad " * 600, "documents": ["sad"]}
    message = refused(client, 422, "query", json=prompt)
    assert message.startswith("[R304] the prompt has 601 tokens, the limit is 511: shorten it; ")


@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/score", "/get_reward"])
def test_a_compressed_body_is_refused_with_what_to_do(client: TestClient, path: str) -> None:
    body = gzip.compress(json.dumps({"query": QUERY, "documents": DOCUMENTS}).encode())
    answer = client.post(path, content=body, headers=JSON | {"content-encoding": "gzip"})
    assert answer.status_code == 415
    error = {"code": "encoding", "message": "send the body without compression"}
    assert answer.json() == {"error": error}


@pytest.mark.parametrize("path", sorted(PROBES))
def test_probes_may_be_asked_with_head(client: TestClient, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert "head" not in client.get("/openapi.json").json()["paths"][path]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_chunks_per_doc": 9}, "max_chunks_per_doc is not supported: documents are never"),
        ({"max_tokens_per_doc": 0}, "max_tokens_per_doc must be at least 1"),
        ({"truncate": "yes please"}, "truncate must be true or false"),
        ({"activation": "relu"}, "activation must be one of the values in /openapi.json"),
        ({"beta": 1.0}, "beta is not supported: β is that of the bundle"),
        ({"top_k": 3}, "top_k is not supported: use top_n"),
        (
            {"foo": 1},
            "unknown field foo: there are query, documents, model, top_n, return_documents, ",
        ),
        ({"A text": 1}, "unknown field: there are query, documents,"),
        ({"query": 5}, "query must be a string or a list of chat messages"),
        ({"query": [{"role": "user"}]}, "query.0.content is missing"),
        (
            {"query": [{"role": "user", "content": "a", "name": "b"}]},
            "unknown field name of a chat message: there are role, content",
        ),
        ({"documents": ["a", 5]}, "documents.1 must be a string or an object with text"),
        ({"documents": [{"body": "a"}]}, "documents.0 must be a string or an object with text"),
        ({"documents": "a"}, "documents must be a list"),
        ({"top_n": 0}, "top_n must be at least 1"),
    ],
)
def test_the_refusal_of_a_malformed_request_names_the_field_and_what_fits(
    reranker: Reranker, wrong: dict[str, object], words: str
) -> None:
    request = {"query": QUERY, "documents": DOCUMENTS} | wrong
    with TestClient(create_app(reranker, strict=True)) as strict:
        message = refused(strict, 422, "malformed", json=request)
    assert message.startswith(words)
    assert ";" not in message.removeprefix(words)


def test_unknown_fields_are_ignored_and_named(client: TestClient) -> None:
    request = {"query": QUERY, "documents": DOCUMENTS}
    plain = client.post("/v1/rerank", json=request).json()
    extra = {"top_k": 3, "rank_fields": None, "foo": CANARY, CANARY: 1, "beta": 3}
    answer = client.post("/v1/rerank", json=request | extra).json()
    assert answer["results"] == plain["results"]
    assert "warnings" not in plain
    beta, top, *unknown = answer["warnings"]
    assert (beta, top) == (
        "beta is ignored: β is that of the bundle",
        "top_k is ignored: use top_n",
    )
    assert [text.partition(":")[0] for text in unknown] == ["unknown field foo", "unknown field"]
    assert CANARY not in str(answer["warnings"])


class HeldReranker(Reranker):
    """Waits before it reads a request, so that the queue fills up."""

    released = threading.Event()
    seen: Sequence[str] = ()

    def encode(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        reference_logps: Sequence[float | None] | None = None,
        reading: Reading = READING,
    ) -> CandidateGroup:
        type(self).seen = [*self.seen, str(prompt)]
        assert self.released.wait(30)
        return super().encode(prompt, candidates, reference_logps, reading)


@pytest.fixture
def held(folder: Path) -> Iterator[HeldReranker]:
    HeldReranker.released.clear()
    HeldReranker.seen = ()
    reranker = HeldReranker.load(folder)
    assert isinstance(reranker, HeldReranker)
    yield reranker
    HeldReranker.released.set()


def ask(client: TestClient, query: str) -> Any:
    return client.post("/v1/rerank", json={"query": query, "documents": ["sad", "happy"]})


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_full_queue_sheds_and_recovers(held: HeldReranker) -> None:
    with client_of(held, queue=3) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, client, f"the cat {'sits ' * i}") for i in range(8)]
        wait_for(lambda: sum(future.done() for future in asked) == 5)
        shed = [future.result() for future in asked if future.done()]
        assert {response.status_code for response in shed} == {429}
        assert {response.headers["retry-after"] for response in shed} == {"1"}
        assert client.get("/livez").status_code == 200  # only scoring waits for the worker
        held.released.set()
        codes = [future.result().status_code for future in asked]
        assert sorted(codes) == [200] * 3 + [429] * 5
        assert ask(client, "a").status_code == 200


def test_a_full_queue_refuses_before_the_body_is_parsed(held: HeldReranker) -> None:
    with client_of(held, queue=1) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client, "the cat")
        wait_for(lambda: held.seen)
        refused = client.post("/v1/rerank", content=b"{", headers=JSON)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "connection" not in refused.headers  # it stays open for the next request
        assert client.get("/v1/models").status_code == 200
        held.released.set()
        assert asked.result().status_code == 200
        assert client.post("/v1/rerank", content=b"{", headers=JSON).status_code == 422


def test_a_late_request_is_dropped_and_never_computed(held: HeldReranker) -> None:
    with client_of(held, seconds=2.0, queue=2) as client, ThreadPoolExecutor(2) as pool:

        def ask_two() -> list[int]:
            asked = [pool.submit(ask, client, f"cat {i}") for i in range(2)]
            return sorted(future.result().status_code for future in asked)

        assert ask_two() == [504, 504]
        assert len(held.seen) == 1  # the thread is still busy with it
        assert ask_two() == [504, 504]
        held.released.set()
        wait_for(lambda: ask(client, "dog").status_code == 200)
        assert [prompt for prompt in held.seen if prompt != "dog"] == held.seen[:1]


def test_concurrent_requests_get_their_own_scores(client: TestClient, reranker: Reranker) -> None:
    queries = [f"the {animal} {'sits ' * i}" for i in range(5) for animal in ("cat", "dog", "bird")]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda query: ask(client, query).json(), queries))
    for query, answer in zip(queries, answers, strict=True):
        expected = [(score.index, score.reward) for score in reranker.rank(query, ["sad", "happy"])]
        assert [(r["index"], r["relevance_score"]) for r in answer["results"]] == expected


def test_an_error_is_answered_and_logged_without_the_request(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = BrokenReranker.load(folder)
    with caplog.at_level(logging.DEBUG), client_of(broken) as client:
        message = refused(client, 500, "internal", json={"query": CANARY, "documents": ["sad"]})
        assert message == "the request could not be scored"
        assert client.get("/livez").status_code == 200
    records = [record.getMessage() for record in caplog.records]
    assert any(re.fullmatch(r"request \w{32} failed: RuntimeError", text) for text in records)
    assert CANARY not in caplog.text + "".join(capfd.readouterr())


def test_a_failed_run_of_the_graph_fails_its_request_only(
    reranker: Reranker, caplog: pytest.LogCaptureFixture
) -> None:
    with client_of(failing(reranker)[0]) as client:
        request = {"query": "the cat", "documents": ["sad", "sits " * 300]}
        message = refused(client, 500, "graph_failed", json=request)
        assert message == "the model could not be run for this request"
        answer = client.post("/v1/rerank", json=request | {"documents": ["sad"]})
        assert answer.status_code == 200
    records = [record.getMessage() for record in caplog.records]
    assert any(re.fullmatch(r"request \w{32} failed: RuntimeException", text) for text in records)


def test_request_text_appears_nowhere(
    client: TestClient, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    said = []
    with caplog.at_level(logging.DEBUG):
        for request in (
            {"query": CANARY, "documents": [""]},
            {"query": CANARY, "documents": [3]},
            {"query": QUERY, "documents": [CANARY + " sad" * 600]},
            {"query": QUERY, "documents": [{CANARY: 1}]},
            {"query": QUERY, "documents": "x", CANARY: CANARY},
            {"query": [{"role": CANARY, "content": CANARY}], "documents": ["a"]},
        ):
            response = client.post("/v1/rerank", json=request)
            assert response.status_code == 422
            said.append(response.text)
        said.append(client.get(f"/{CANARY}").text)
    records = [record.getMessage() for record in caplog.records if "httpx" not in record.name]
    assert CANARY not in "".join([*said, *records, *capfd.readouterr()])


def test_missing_extra_is_named(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtraError, match=r"logratio\[serve\].*logratio\[serve-cpu\]"):
        create_app(reranker)


def test_a_server_process_answers_and_stops_on_sigterm(folder: Path) -> None:
    with running(folder, "--log-format", "off") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = json.dumps({"query": QUERY, "documents": DOCUMENTS})
        connection.request("POST", "/v1/rerank", body, JSON)
        response = connection.getresponse()
        assert response.status == 200
        assert "server" not in {name.lower() for name, _ in response.getheaders()}
        assert len(json.loads(response.read())["results"]) == len(DOCUMENTS)
        connection.putrequest("POST", "/v1/rerank")
        connection.putheader("content-length", str(2**21 + 1))
        connection.endheaders()
        with connection.getresponse() as response:  # before the body is sent
            assert response.status == 413
            response.read()
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_request_in_flight_is_answered_before_the_server_stops(folder: Path) -> None:
    documents = [
        f"{'sad ' * (i % 40)}{'happy ' * (i // 40)}" + "loud " * 350 for i in range(1, 160)
    ]
    body = json.dumps({"query": QUERY, "documents": documents})
    with running(folder) as (process, port), ThreadPoolExecutor(1) as pool:

        def post() -> int:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/v1/rerank", body, JSON)
            with connection.getresponse() as response:
                results = json.loads(response.read())["results"]
            connection.close()
            return len(results)

        answer = pool.submit(post)
        time.sleep(0.4)
        assert not answer.done()  # some 60,000 tokens take longer
        process.send_signal(signal.SIGTERM)
        assert answer.result() == len(documents)
        assert process.wait(20) == 0


def test_a_disconnected_client_frees_its_place(folder: Path) -> None:
    with running(folder) as (_, port):
        body = json.dumps({"query": "the cat", "documents": ["sad " * 400] * 200})
        for _ in range(80):  # more than the queue holds
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", "/v1/rerank", body, JSON)
            connection.close()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        statuses: list[int] = []

        def answered() -> bool:
            connection.request(
                "POST", "/v1/rerank", json.dumps({"query": QUERY, "documents": ["sad"]}), JSON
            )
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
            return response.status == 200

        wait_for(answered)
        connection.close()
        assert statuses[-1] == 200
        assert set(statuses) <= {200, 503}


def test_a_used_address_is_reported_before_the_bundle_is_loaded(tmp_path: Path) -> None:
    import socket

    from logratio.serving.config import ServeConfig
    from logratio.serving.server import serve

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        serve(ServeConfig(tmp_path / "nowhere", port=taken.getsockname()[1]))
