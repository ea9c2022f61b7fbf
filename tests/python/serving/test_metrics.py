"""`/metrics`: what is counted, and that the number of labels is bounded."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from repository import ROOT
from starlette.testclient import TestClient
from tiny_bundle import tiny_bundle

from logratio.bundle import digest_of, manifest_bytes
from logratio.serving import Reranker
from logratio.serving.limits import Limits
from logratio.serving.server import create_app

REQUEST = {"query": "the cat", "documents": ["sad", "happy loud"]}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    reranker = Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")
    with TestClient(create_app(reranker, Limits(body_bytes=1000))) as client:
        yield client


def samples(client: TestClient) -> Samples:
    """Read the metrics with the parser of Prometheus' own library."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def test_a_request_is_counted_with_its_tokens_times_and_runs(client: TestClient) -> None:
    before = samples(client)
    usage = client.post("/v1/rerank", json=REQUEST).json()["usage"]
    after = samples(client)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("logratio_requests_total", route="/v1/rerank", status="200") == 1
    of_bundle = {"bundle": "default"}
    assert grown("logratio_tokens_total", kind="prompt", **of_bundle) == usage["prompt_tokens"]
    scored = grown("logratio_tokens_total", kind="candidate", **of_bundle)
    assert scored == usage["completion_tokens"]
    assert grown("logratio_runs_total", **of_bundle) == 1
    computed = grown("logratio_run_tokens_total", **of_bundle)
    real = grown("logratio_run_real_tokens_total", **of_bundle)
    assert computed > real == usage["total_tokens"]  # the candidates differ in length
    assert grown("logratio_run_seconds_total", **of_bundle) > 0
    for phase in ("queue", "encode", "compute"):
        assert grown("logratio_phase_seconds_count", phase=phase) == 1
    assert grown("logratio_phase_seconds_sum", phase="compute") == pytest.approx(
        grown("logratio_run_seconds_total", **of_bundle)
    )
    assert grown("logratio_request_seconds_count", route="/v1/rerank") == 1
    assert value(after, "logratio_in_flight") == value(after, "logratio_queue_length") == 0


def test_rejections_are_counted_by_cause(client: TestClient) -> None:
    client.post("/v1/rerank", json={})
    client.post("/v1/rerank", content=b" " * 1001)
    client.post("/v1/rerank", content=b" " * 1001)
    found = samples(client)
    assert value(found, "logratio_rejections_total", cause="malformed") == 1
    assert value(found, "logratio_rejections_total", cause="body_too_large") == 2


def test_the_bundle_is_shown(client: TestClient, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny_bundle(tmp_path_factory) / "bundle"
    ((_, labels),) = [key for key in samples(client) if key[0] == "logratio_bundle_info"]
    shown = dict(labels)
    assert shown["digest"] == digest_of(manifest_bytes(folder))
    assert shown["kind"] == "two_models"
    assert shown["provider"] == "CPUExecutionProvider"


def test_unknown_paths_and_methods_make_no_new_labels(client: TestClient) -> None:
    for number in range(50):
        client.get(f"/path-{number}")
        client.request(f"METHOD{number}", "/v1/rerank")
    routes = {
        dict(labels)["route"]
        for name, labels in samples(client)
        if name == "logratio_requests_total"
    }
    assert routes <= {"/v1/rerank", "/metrics", "other"}


def test_many_requests_at_once_are_all_counted(client: TestClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        codes = [
            *pool.map(lambda _: client.post("/v1/rerank", json=REQUEST).status_code, range(40))
        ]
    found = samples(client)
    assert sum(
        count for (name, labels), count in found.items()
        if name == "logratio_requests_total" and dict(labels)["route"] == "/v1/rerank"
    ) == 40  # fmt: skip
    assert value(found, "logratio_phase_seconds_count", phase="compute") >= codes.count(200) > 0


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(client: TestClient) -> None:
    client.post("/v1/rerank", json=REQUEST)
    client.post("/v1/rerank", json={})
    labels: dict[str, set[str]] = {}
    for name, its in samples(client):
        if name.endswith("_created"):  # times at which the library made the counters
            continue
        labels.setdefault(name, set()).update(key for key, _ in its)
    board = json.loads((ROOT / "python/logratio-serve/grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) >= 8
    shown = set()
    for query in queries:
        names = re.findall(r"logratio_\w+", query)
        assert names and set(names) <= labels.keys(), query
        shown |= set(names)
        grouped = re.findall(r"by \(([^)]*)\)", query)
        used = {word.strip() for group in grouped for word in group.split(",")}
        assert used <= {"le"}.union(*(labels[name] for name in names)), query
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels}
    asked = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert families == asked, "a metric is missing from the dashboard"
