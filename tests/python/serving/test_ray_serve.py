"""Ray Serve on this machine: replicas give the scores of the reranker, also after one is killed.

`make ray-serve` runs this; it needs ``ray[serve]``.
"""

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
from tiny_bundle import tiny_bundle

from logratio.extras import require
from logratio.serving import Reranker
from logratio.serving.ray_serve import RaySettings, application

pytestmark = [
    pytest.mark.ray_serve,
    pytest.mark.filterwarnings("ignore"),  # of Ray's own code, while it is imported
]

QUERY, DOCUMENTS = "the cat sits", ["on the mat happy", "sad", "under a tree loud loud"]
PORT = 18_437
KEY = "a-key-of-the-ray-serve-test"
REPLICAS = 2


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray Serve on this machine with two replicas of the tiny bundle."""
    # A busy machine takes long to start.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "180",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    }
    ray, serve = require("ray", "ray"), require("ray.serve", "ray")
    folder = tiny_bundle(tmp_path_factory) / "bundle"
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"LOGRATIO_API_KEYS": KEY}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(RaySettings(bundle=str(folder), replicas=REPLICAS)))
        yield serve
    finally:
        serve.shutdown()
        ray.shutdown()


def posted(**headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/rerank", body, {"content-type": "application/json"} | named)
    try:
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def rewards() -> list[float]:
    status, answer = posted(x_api_key=KEY)
    assert status == 200, answer
    found = {one["index"]: one["relevance_score"] for one in answer["results"]}
    return [found[index] for index in range(len(DOCUMENTS))]


def processes() -> set[int]:
    """The process ids of the replicas that run."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "".join(child.cmdline()[:1]).startswith("ray::ServeReplica"):
                found.add(child.pid)
    return found


def test_the_scores_are_those_of_the_reranker(serve: Any, reranker: Reranker) -> None:
    expected = [score.reward for score in reranker.score(QUERY, DOCUMENTS)]
    for _ in range(10):
        assert rewards() == pytest.approx(expected, abs=1e-6)


def test_a_request_without_a_key_is_refused(serve: Any) -> None:
    status, answer = posted()
    assert (status, answer["error"]["code"]) == (401, "unauthorized")


def test_a_killed_replica_is_replaced_and_requests_are_answered(
    serve: Any, reranker: Reranker
) -> None:
    expected = [score.reward for score in reranker.score(QUERY, DOCUMENTS)]
    before = processes()
    assert len(before) == REPLICAS
    os.kill(min(before), signal.SIGKILL)
    deadline = time.monotonic() + 120
    while len(now := processes() - {min(before)}) < REPLICAS:
        assert time.monotonic() < deadline, now
        time.sleep(0.5)
    for _ in range(10):
        assert rewards() == pytest.approx(expected, abs=1e-6)
    assert len(now - before) == 1
