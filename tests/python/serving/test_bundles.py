"""Several bundles in one server: which one a request gets, under every API."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tiny_bundle import other_bundle, tiny_bundle

from logratio.cli.app import app as commands
from logratio.cli.app import lists_of, spread
from logratio.errors import ConfigError, SettingTypeError
from logratio.serving import Reranker
from logratio.serving.config import ServeConfig
from logratio.serving.keys import Keys
from logratio.serving.server import create_app

QUERY, DOCUMENTS = "the cat", ["sad", "happy loud"]
KEY = "a-key-of-these-tests"


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reranker]:
    folders = (tiny_bundle(tmp_path_factory) / "bundle", other_bundle(tmp_path_factory))
    return dict(zip(("first", "team/second"), map(Reranker.load, folders), strict=True))


@pytest.fixture(scope="module")
def client(rerankers: dict[str, Reranker]) -> Iterator[TestClient]:
    with TestClient(create_app(rerankers)) as client:
        yield client


def rewards(reranker: Reranker) -> list[float]:
    return [score.reward for score in reranker.score(QUERY, DOCUMENTS)]


def requests(model: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """A request of each API with a field `model`, for the same prompt and candidates."""
    named = {} if model is None else {"model": model}
    yield "/v1/rerank", named | {"query": QUERY, "documents": DOCUMENTS}
    yield "/rerank", named | {"query": QUERY, "texts": DOCUMENTS}
    yield "/infinity/rerank", named | {"query": QUERY, "documents": DOCUMENTS}
    yield "/v1/score", named | {"groups": [{"prompt": QUERY, "candidates": DOCUMENTS}]}
    yield "/v1/best_of", named | {"prompt": QUERY, "candidates": DOCUMENTS}
    yield "/score", named | {"text_1": QUERY, "text_2": DOCUMENTS}


def found(body: Any) -> list[float]:
    """The rewards of an answer, in the order of the candidates."""
    if isinstance(body, list):
        return [one["score"] for one in sorted(body, key=lambda one: one["index"])]
    if "results" in body:
        by_index = sorted(body["results"], key=lambda one: one["index"])
        return [one["relevance_score"] for one in by_index]
    if "data" in body:
        return [one["score"] for one in body["data"]]
    group = body["scores"] if "scores" in body else body["groups"][0]
    return [one["reward"] for one in group["results"]]


@pytest.mark.parametrize("model", [None, "first", "team/second"])
def test_model_selects_the_bundle_in_every_api(
    client: TestClient, rerankers: dict[str, Reranker], model: str | None
) -> None:
    reranker = rerankers[model or "first"]
    for path, request in requests(model):
        answer = client.post(path, json=request)
        assert found(answer.json()) == rewards(reranker), path
        assert answer.headers["x-bundle-digest"] == reranker.digest
        if isinstance(answer.json(), dict):
            assert answer.json()["model"] == (model or "first")
    assert rewards(rerankers["first"]) != rewards(rerankers["team/second"])


def test_an_unknown_model_is_404_with_the_names(client: TestClient) -> None:
    for path, request in requests("xyzzy-canary"):
        answer = client.post(path, json=request)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["code"] == "model_not_found"
        assert "first, team/second" in error["message"]
        assert "xyzzy" not in answer.text + str(answer.headers)
        assert "x-bundle-digest" not in answer.headers


def test_a_server_with_one_bundle_accepts_any_model(rerankers: dict[str, Reranker]) -> None:
    with TestClient(create_app({"only": rerankers["first"]})) as client:
        for path, request in requests("rerank-v3.5"):
            assert found(client.post(path, json=request).json()) == rewards(rerankers["first"])
        assert client.post("/m/rerank-v3.5/v1/rerank", json=request).status_code == 404


@pytest.mark.parametrize("name", ["first", "team/second"])
def test_a_name_in_the_path_selects_the_bundle(
    client: TestClient, rerankers: dict[str, Reranker], name: str
) -> None:
    for path, request in requests("gpt-4"):  # the name in the path takes precedence
        assert found(client.post(f"/m/{name}{path}", json=request).json()) == rewards(
            rerankers[name]
        )
    request = {"query": ["the cat sits"], "prompts": ["the cat"]}
    answer = client.post(f"/m/{name}/get_reward", json=request)
    assert answer.headers["x-bundle-digest"] == rerankers[name].digest
    route = f'route="/get_reward",status="{answer.status_code}"'
    assert route in client.get("/metrics").text


@pytest.mark.parametrize("path", ["/m/none/v1/rerank", "/m/first", "/m/", "/m/firstv1/rerank"])
def test_an_unknown_name_in_the_path_is_404(client: TestClient, path: str) -> None:
    answer = client.post(path, json={"query": QUERY, "documents": DOCUMENTS})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_name_in_the_path_opens_nothing_without_a_key(rerankers: dict[str, Reranker]) -> None:
    with TestClient(create_app(rerankers, keys=Keys([KEY]))) as client:
        for path in ("/m/first/v1/rerank", "/m/first/livez", "/m/none/metrics"):
            assert client.get(path).status_code == 401


def test_models_and_metrics_have_every_bundle(
    client: TestClient, rerankers: dict[str, Reranker]
) -> None:
    models = client.get("/v1/models").json()["data"]
    digests = {name: reranker.digest for name, reranker in rerankers.items()}
    assert {model["id"]: model["digest"] for model in models} == digests

    def counted() -> dict[str, float]:
        samples = [
            sample
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
        ]
        info = [sample.labels for sample in samples if sample.name == "logratio_bundle_info"]
        assert {labels["bundle"]: labels["digest"] for labels in info} == digests
        runs = [sample for sample in samples if sample.name == "logratio_runs_total"]
        return {sample.labels["bundle"]: sample.value for sample in runs}

    before = counted()
    client.post("/v1/rerank", json={"model": "first", "query": QUERY, "documents": DOCUMENTS})
    after = counted()
    assert {name: after[name] - before[name] for name in after} == {"first": 1, "team/second": 0}


def test_each_bundle_has_a_speed_of_its_own(
    rerankers: dict[str, Reranker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow bundle must not make the requests of a fast one look too large."""
    monkeypatch.setattr(rerankers["team/second"], "timings", lambda: [(10, 100.0), (20, 200.0)])
    with TestClient(create_app(rerankers)) as client:
        request = {"query": QUERY, "documents": DOCUMENTS}
        answer = client.post("/v1/rerank", json=request | {"model": "team/second"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_slow")
        assert client.post("/v1/rerank", json=request).status_code == 200


def test_every_bundle_is_warm_before_the_server_is_ready(
    rerankers: dict[str, Reranker], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[Reranker, int]] = []
    compute = Reranker.compute

    def recorded(self: Reranker, groups: Any, run: Any, stop: Any = None) -> Any:
        runs.append((self, run.tokens))
        return compute(self, groups, run, stop)

    monkeypatch.setattr(Reranker, "compute", recorded)
    with TestClient(create_app(rerankers)) as client:
        warm = [*runs]
        assert client.get("/readyz").status_code == 200
    for reranker in rerankers.values():
        sizes = [tokens for one, tokens in warm if one is reranker]
        assert min(sizes) < 20 and max(sizes) > 150  # a small shape and a long one


def test_names_of_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "lr=1e-6"
    odd.mkdir()

    def folders(*given: Any) -> dict[str, Path]:
        return ServeConfig(given if len(given) > 1 else given[0]).folders()

    assert folders("a/b") == {"": Path("a/b")}
    assert folders("x=a/b") == {"x": Path("a/b")}
    assert folders("a/b", "org/x=a/c") == {"b": Path("a/b"), "org/x": Path("a/c")}
    assert folders(f"y={odd}", "x=b") == {"y": odd, "x": Path("b")}
    assert folders(odd) == {"": odd}
    assert folders({"x": "a", "y": "b"}) == {"x": Path("a"), "y": Path("b")}
    for given, words in (
        ((odd, "b"), "not a name"),
        (("a/b", "c/b"), "two bundles have the name 'b'"),
        (("x y=a", "b"), "not a name"),
        (("=a", "b"), "not a name"),
    ):
        with pytest.raises(ConfigError, match=words):
            folders(*given)
    with pytest.raises(ConfigError, match="no folder"):
        ServeConfig(())
    with pytest.raises(SettingTypeError, match="bundle"):
        ServeConfig(3)  # type: ignore[arg-type]


def test_bundles_come_from_flags_variables_and_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[ServeConfig] = []
    monkeypatch.setattr("logratio.serving.server.serve", seen.append)
    file = tmp_path / "serve.yaml"
    file.write_text("bundle:\n  x: a\n  y: b\n")
    group = typer.main.get_command(commands)

    def bundles(*arguments: str) -> Any:
        line = spread(arguments, lists_of(group, arguments))
        group.main(["serve", *line[1:]], standalone_mode=False)
        return seen[-1].bundle

    assert bundles("serve", "--config", str(file)) == ("x=a", "y=b")
    assert bundles("serve", "--bundle", "x=a,b", "y=c", "--port", "1") == ("x=a,b", "y=c")
    monkeypatch.setenv("LOGRATIO_BUNDLE", "x=my folder:b")
    assert bundles("serve") == ("x=my folder", "b")
    assert ServeConfig.from_yaml(file) == ServeConfig(["x=a", "y=b"])


def test_each_bundle_may_have_an_expected_digest() -> None:
    several = ServeConfig(("x=a", "y=b"), expect="sha256:1, sha256:2")
    assert several.expected() == {"x": "sha256:1", "y": "sha256:2"}
    assert replace(several, expect=None).expected() == {"x": None, "y": None}
    with pytest.raises(ConfigError, match="1 digests for 2 bundles"):
        replace(several, expect="sha256:1").expected()
