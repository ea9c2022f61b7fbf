"""The Open Inference Protocol v2: tensors of text in, tensors of scores out, errors as text."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from tiny_bundle import copy_bundle, tiny_bundle, with_template

from logratio.bundle import REFERENCE_FREE, REWARD_MODEL
from logratio.serving import Reranker, Score
from logratio.serving.access_log import Log
from logratio.serving.keys import Keys
from logratio.serving.limits import Limits
from logratio.serving.routes_open_inference import outputs_of
from logratio.serving.server import create_app

PROMPT = "the cat sits"
CANDIDATES = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
OTHER = ("the dog", ["runs", "sad sad", "", "loud"])
ALL = ["rewards", "policy_logps", "reference_logps", "tokens", "truncated", "errors"]
CANARY = "xyzzy-canary"
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")


@pytest.fixture(scope="module")
def client(reranker: Reranker) -> Iterator[TestClient]:
    with TestClient(create_app(reranker)) as client:
        yield client


@pytest.fixture(scope="module")
def url(reranker: Reranker) -> str:
    return f"/v2/models/{reranker.manifest.name}"


def tensor(name: str, data: list[Any], *shape: int) -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(data)], "datatype": "BYTES", "data": data}


def request(
    prompts: list[str], candidates: list[Any], *shape: int, **others: Any
) -> dict[str, Any]:
    inputs = [tensor("prompt", prompts), tensor("candidates", candidates, *shape)]
    return {"inputs": inputs} | others


def arrays(answer: dict[str, Any]) -> dict[str, Any]:
    """The outputs as tritonclient and kserve read them from JSON."""
    types = {"FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_, "BYTES": np.object_}
    return {
        one["name"]: np.array(one["data"], types[one["datatype"]]).reshape(one["shape"])
        for one in answer["outputs"]
    }


def refusal(client: TestClient, url: str, body: Any, **headers: str) -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = client.post(f"{url}/infer", content=content, headers=named)
    assert set(answer.json()) == {"error"}
    return answer.status_code, answer.json()["error"]


def test_probes_and_metadata_are_those_of_the_protocol(
    client: TestClient, reranker: Reranker, url: str
) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"live": True, "ready": True}
    server = client.get("/v2").json()
    assert (server["name"], server["extensions"]) == ("logratio", ["binary_tensor_data"])
    for path in (url, f"{url}/versions/{reranker.digest}"):
        assert client.get(f"{path}/ready").json() == {"name": reranker.manifest.name, "ready": True}
        model = client.get(path).json()
        assert (model["platform"], model["versions"]) == ("onnx_onnxv1", [reranker.digest])
        assert [one["name"] for one in model["inputs"]] == ["prompt", "candidates"]
        assert [one["name"] for one in model["outputs"]] == ALL
        assert all(one.keys() == {"name", "datatype", "shape"} for one in model["outputs"])


def test_the_scores_of_one_prompt_are_those_of_the_reranker(
    client: TestClient, reranker: Reranker, url: str
) -> None:
    answer = client.post(f"{url}/infer", json=request([PROMPT], CANDIDATES, id="seven"))
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert (content["id"], content["model_version"]) == ("seven", reranker.digest)
    found = arrays(content)
    assert [*found] == ALL
    expect(found, reranker.score(PROMPT, CANDIDATES))


def test_the_request_of_kserves_client_has_no_unknown_field(reranker: Reranker, url: str) -> None:
    body = request([PROMPT], CANDIDATES, id="one", model_name=reranker.manifest.name)
    with TestClient(create_app(reranker, strict=True)) as strict:
        answer = strict.post(f"{url}/infer", json=body)
    assert answer.status_code == 200, answer.text
    assert "parameters" not in answer.json()  # no warning


def expect(found: dict[str, Any], scores: list[Score]) -> None:
    """Compare flat outputs with scores."""
    assert found["rewards"] == pytest.approx([one.reward for one in scores], abs=1e-5, nan_ok=True)
    for name in ("policy_logps", "reference_logps"):
        values = [getattr(one, name) for one in scores]
        assert found[name] == pytest.approx(values, abs=1e-4, nan_ok=True)
    assert found["tokens"].tolist() == [one.tokens for one in scores]
    assert found["truncated"].tolist() == [one.truncated for one in scores]
    assert [bool(text) for text in found["errors"]] == [bool(one.error) for one in scores]


def test_several_prompts_have_rows_and_short_rows_end_with_empty_texts(
    client: TestClient, reranker: Reranker, url: str
) -> None:
    expected = [*reranker.score(PROMPT, CANDIDATES), *reranker.score(*OTHER)]
    nested = [CANDIDATES, OTHER[1]]
    for data in (nested, [*CANDIDATES, *OTHER[1]]):
        body = request([PROMPT, OTHER[0]], data, 2, 4)
        found = arrays(client.post(f"{url}/infer", json=body).json())
        assert {array.shape for array in found.values()} == {(2, 4)}
        expect({name: array.ravel() for name, array in found.items()}, expected)
        assert math.isnan(found["rewards"][1, 2])
        assert found["errors"][1, 2] == "[R301] an empty completion"
    columns = {"inputs": [tensor("prompt", [PROMPT, OTHER[0]], 2, 1), body["inputs"][1]]}
    assert arrays(client.post(f"{url}/infer", json=columns).json())["tokens"].shape == (2, 4)


def test_only_the_outputs_that_are_asked_for_are_returned(client: TestClient, url: str) -> None:
    body = request([PROMPT], CANDIDATES, outputs=[{"name": "tokens"}, {"name": "rewards"}])
    assert [*arrays(client.post(f"{url}/infer", json=body).json())] == ["tokens", "rewards"]
    code, message = refusal(client, url, body | {"outputs": [{"name": "logits"}]})
    assert (code, message) == (400, f"outputs.0: there are {', '.join(ALL)}")


def test_long_candidates_are_truncated_by_a_parameter(client: TestClient, url: str) -> None:
    body = request([PROMPT], ["sad " * 600])
    whole = arrays(client.post(f"{url}/infer", json=body).json())
    assert "601 tokens" in whole["errors"][0]
    cut = arrays(client.post(f"{url}/infer", json=body | {"parameters": {"truncate": True}}).json())
    assert (cut["truncated"][0], cut["tokens"][0], cut["errors"][0]) == (True, 508, "")
    wrong = body | {"parameters": {"truncate": "yes"}}
    assert refusal(client, url, wrong) == (400, "the parameter truncate must be true or false")


def test_prompts_may_be_chats(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, client: TestClient, url: str
) -> None:
    folder = copy_bundle(tmp_path_factory, tmp_path / "chat")
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    reranker = Reranker.load(with_template(folder, template))
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sits"},
             {"role": "user", "content": "the dog"}]  # fmt: skip
    with TestClient(create_app(reranker)) as chats:
        path = f"/v2/models/{reranker.manifest.name}/infer"
        body = request([json.dumps(turns)], ["sad", "happy"], parameters={"messages": True})
        found = arrays(chats.post(path, json=body).json())
    expect(found, reranker.score(turns, ["sad", "happy"]))
    code, message = refusal(client, url, request(["x"], ["y"], parameters={"messages": True}))
    assert (code, message[:20]) == (400, "prompt 0 is not JSON")


def as_bytes(texts: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)


def binary(
    prompts: list[str], candidates: list[str], **others: Any
) -> tuple[bytes, dict[str, str]]:
    """A request as tritonclient sends it by default, and its headers."""
    blobs = [as_bytes(prompts), as_bytes(candidates)]
    inputs: list[dict[str, Any]] = [
        {"name": name, "shape": [len(texts)], "datatype": "BYTES",
         "parameters": {"binary_data_size": len(blob)}}
        for name, texts, blob in zip(
            ("prompt", "candidates"), (prompts, candidates), blobs, strict=True
        )
    ]  # fmt: skip
    header = json.dumps({"inputs": inputs} | others).encode()
    named = {LENGTH: str(len(header)), "content-type": "application/octet-stream"}
    return header + b"".join(blobs), named


def test_tensors_may_be_bytes_after_the_json(
    client: TestClient, reranker: Reranker, url: str
) -> None:
    texts = [*CANDIDATES[:2], "", "naïve 猫"]
    body, headers = binary([PROMPT], texts, parameters={"binary_data_output": True})
    answer = client.post(f"{url}/infer", content=body, headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[LENGTH])
    content, rest = json.loads(answer.content[:length]), answer.content[length:]
    found: dict[str, Any] = {}
    for one in content["outputs"]:
        size = one["parameters"]["binary_data_size"]
        found[one["name"]], rest = rest[:size], rest[size:]
    assert not rest
    types = {"tokens": "<i8", "truncated": "?"}
    numbers = {
        name: np.frombuffer(part, types.get(name, "<f4"))
        for name, part in found.items()
        if name != "errors"
    }
    lengths, errors, part = [], [], found["errors"]
    while part:
        lengths.append(struct.unpack_from("<I", part)[0])
        errors.append(part[4 : 4 + lengths[-1]].decode())
        part = part[4 + lengths[-1] :]
    expect(numbers | {"errors": errors}, reranker.score(PROMPT, texts))


def test_binary_and_json_outputs_may_be_mixed(client: TestClient, url: str) -> None:
    outputs = [{"name": "rewards", "parameters": {"binary_data": True}}, {"name": "tokens"}]
    answer = client.post(f"{url}/infer", json=request([PROMPT], CANDIDATES, outputs=outputs))
    length = int(answer.headers[LENGTH])
    first, second = json.loads(answer.content[:length])["outputs"]
    assert (first["parameters"], "data" in first) == ({"binary_data_size": 16}, False)
    assert len(second["data"]) == 4
    plain = arrays(client.post(f"{url}/infer", json=request([PROMPT], CANDIDATES)).json())
    assert np.frombuffer(answer.content[length:], "<f4").tolist() == plain["rewards"].tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": []}, "inputs must be the tensors prompt and candidates"),
        ({"inputs": [tensor("prompt", ["a"])]}, "inputs must be the tensors"),
        ({"inputs": [tensor("prompt", ["a"])] * 2}, "inputs.1 has the name of an earlier input"),
        ({"inputs": None}, "inputs must be a list"),
        (request([PROMPT, "b"], CANDIDATES), "candidates must have the shape [N]"),
        (request([PROMPT], CANDIDATES, 2, 2), "candidates must have the shape [N]"),
        (request([PROMPT], CANDIDATES, 3), "inputs.1 has 4 elements, and its shape has 3"),
        (request([PROMPT], CANDIDATES, 1, 2, 2), "inputs.1.shape must be one or two sizes"),
        (request([PROMPT], CANDIDATES, -4), "inputs.1.shape must be one or two sizes"),
        (request([PROMPT], [1, 2]), "inputs.1.data must have strings only"),
        (request([PROMPT], [[["a"]]], 1), "inputs.1.data must have strings only"),
        ({"inputs": [tensor("prompt", ["a"]) | {"datatype": "FP32"}]}, "the datatype BYTES"),
        ({"inputs": [tensor("prompt", ["a"]) | {"data": None}]}, "inputs.0 has no data"),
        ({"inputs": [tensor("prompt", ["a"]) | {"parameters": {"x": 1}}]}, "an unknown parameter"),
        ({"parameters": {"truncate": None}}, "truncate must be true or false"),
        ({"parameters": [1]}, "parameters has another type"),
        ({"parameters": {"binary_data_output": 1}}, "must be true or false"),
    ],
)
def test_what_does_not_follow_the_protocol_is_refused(
    client: TestClient, url: str, change: dict[str, Any], words: str
) -> None:
    code, message = refusal(client, url, request([PROMPT], CANDIDATES) | change)
    assert code == 400
    assert words in message


def test_broken_bytes_are_refused(client: TestClient, url: str) -> None:
    body, headers = binary([PROMPT], CANDIDATES)
    length = int(headers[LENGTH])

    def words(content: bytes, size: object = length) -> str:
        code, message = refusal(client, url, content, inference_header_content_length=str(size))
        assert code == 400
        return message

    code, message = refusal(client, url, body, content_encoding="gzip")
    assert (code, message) == (415, "send the body without compression")
    assert "is larger than the body" in words(body, len(body) + 1)
    assert "must be a number of bytes" in words(body, "-1")
    assert "the body is not JSON" in words(body, length - 1)
    assert "less bytes" in words(body[:-1])
    assert "more bytes" in words(body + b"x")
    assert "element 0 is not UTF-8" in words(body.replace(PROMPT.encode(), b"\xff" * len(PROMPT)))
    assert "end within an element" in words(body.replace(b"\x0c\0\0\0", b"\xff\0\0\0"))
    small = json.dumps({"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES",
                                    "parameters": {"binary_data_size": 3}}]}).encode()  # fmt: skip
    assert "end within a length" in words(small + b"abc", len(small))


def test_unknown_models_versions_and_paths_are_errors_as_text(
    client: TestClient, reranker: Reranker, url: str
) -> None:
    for path in ("/v2/models/other", "/v2/models/other/ready", f"{url}/versions/1"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert reranker.manifest.name in answer.json()["error"]
    assert client.get(f"{url}/what").json() == {"error": "no such path"}
    assert client.get(f"{url}/infer").json() == {"error": "method not allowed"}
    code, _ = refusal(client, "/v2/models/other", request([PROMPT], CANDIDATES))
    assert code == 404


def test_every_refusal_has_the_protocols_format(reranker: Reranker, url: str) -> None:
    limits, key = Limits(body_bytes=1000, documents=3), "a-key-of-these-tests"
    with TestClient(create_app(reranker, limits, keys=Keys([key]))) as client:
        assert refusal(client, url, request([PROMPT], CANDIDATES)) == (
            401,
            "a valid API key is needed",
        )
        code, message = refusal(client, url, request([PROMPT], CANDIDATES), x_api_key=key)
        assert (code, message) == (422, "at most 3 documents a query")
        code, message = refusal(client, url, b"x" * 2000, x_api_key=key)
        assert (code, message) == (413, "the limit is 1,000 bytes per request")
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200  # a probe needs no key
        client.app.state.server.draining = True  # type: ignore[attr-defined]
        answer = client.get("/v2/health/ready")
        assert (answer.status_code, answer.json()) == (
            503,
            {"error": "the server is shutting down"},
        )
        assert client.get(f"{url}/ready", headers={"x-api-key": key}).status_code == 503
        rerank = client.post("/v2/rerank", json={}, headers={"x-api-key": key})
        assert set(rerank.json()["error"]) == {"code", "message"}  # another API below /v2


def test_unknown_fields_and_parameters_are_named_or_refused(
    client: TestClient, reranker: Reranker, url: str
) -> None:
    body = request([PROMPT], CANDIDATES, priority=1, parameters={"timeout": 5})
    found = client.post(f"{url}/infer", json=body).json()["parameters"]["warnings"]
    assert "unknown field priority" in found
    assert "unknown parameters: there are truncate, messages" in found
    with TestClient(create_app(reranker, strict=True)) as strict:
        for part in ({"priority": 1}, {"parameters": {"timeout": 5}}):
            code, _ = refusal(strict, url, request([PROMPT], CANDIDATES) | part)
            assert code in (400, 422)


def test_no_error_and_no_log_line_has_text_of_a_request(reranker: Reranker, url: str) -> None:
    lines: list[str] = []

    class Lines:
        write = staticmethod(lines.append)
        dropped = 0

    log: Any = Log(Lines(), "json")  # type: ignore[arg-type]
    good = request([PROMPT], CANDIDATES)
    prompt, candidates = good["inputs"]
    changes: list[dict[str, Any]] = [
        *({"inputs": [candidates | {name: CANARY}, prompt]} for name in candidates),
        *({"inputs": [candidates | {name: [CANARY]}, prompt]} for name in candidates),
        {"inputs": [prompt, candidates | {"data": [CANARY]}]},
        {"inputs": [prompt, candidates | {CANARY: CANARY, "parameters": {CANARY: CANARY}}]},
        {"outputs": [{"name": CANARY}]},
        {"outputs": [{"name": "rewards", "parameters": {CANARY: CANARY}}]},
        {"parameters": {"truncate": CANARY}},
        {"inputs": [prompt | {"data": [CANARY]}, candidates], "parameters": {"messages": True}},
        {"parameters": CANARY},
    ]
    with TestClient(create_app(reranker, strict=True, log=log)) as client:
        answers = [client.post(f"{url}/infer", json=good | change) for change in changes]
        answers += [client.post(f"{url}/infer", json=good, headers={LENGTH: CANARY})]
        answers += [client.post(f"{url}/infer", content=CANARY)]
        answers += [client.get(f"{url}/{CANARY}"), client.get(f"/v2/models/{CANARY}/ready")]
        answers += [client.get(f"{url}/versions/{CANARY}")]
    assert {answer.status_code for answer in answers} == {400, 404, 422}
    assert len(lines) == len(answers)
    assert CANARY not in "".join([*(answer.text for answer in answers), *lines])


def test_the_outputs_are_those_that_a_bundle_has(reranker: Reranker) -> None:
    class Kind:
        def __init__(self, kind: str) -> None:
            self.manifest = self.graph = self
            self.kind = kind

    given: Any = Kind(REWARD_MODEL)
    assert [*outputs_of(given)] == ["rewards", "tokens", "truncated", "errors"]
    given = Kind(REFERENCE_FREE)
    assert "reference_logps" not in outputs_of(given)
    assert [*outputs_of(reranker)] == ALL


def test_the_schema_describes_the_request(client: TestClient, url: str) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    found = [path for path in paths if path.startswith("/v2/models")]
    assert len(found) == 6
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert "$ref" not in json.dumps(content)
        (example,) = content["schema"]["examples"]
        assert client.post(f"{url}/infer", json=example).status_code == 200
