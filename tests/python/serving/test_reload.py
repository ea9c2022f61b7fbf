"""Bundles are replaced under load: no request fails, and each answer is that of one bundle."""

import gc
import json
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from running_server import running
from starlette.testclient import TestClient
from tiny_bundle import other_bundle, tiny_bundle

from logratio.bundle import GRAPH, digest_of, manifest_bytes
from logratio.serving import Reranker
from logratio.serving.server import create_app

QUERY, DOCUMENTS = "the cat", ["sad", "happy loud", "on the mat"]
SWAPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_bundle(tmp_path_factory) / "bundle", other_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def rewards(folders: tuple[Path, Path]) -> dict[str | None, list[float]]:
    """The rewards of both bundles, by digest."""
    both = [Reranker.load(folder) for folder in folders]
    return {one.digest: [score.reward for score in one.score(QUERY, DOCUMENTS)] for one in both}


def place(folder: Path, link: Path) -> str:
    """Let a link name another folder, atomically; return the bundle's digest."""
    new = link.with_name("new")
    new.symlink_to(folder)
    new.replace(link)
    return digest_of(manifest_bytes(folder))


def connected(port: int) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", port, timeout=30)


def ask(connection: HTTPConnection, method: str, path: str, body: Any = None) -> tuple[Any, Any]:
    """Return the headers and the JSON (or text) of an answer that must be 200."""
    headers = {"content-type": "application/json"}
    connection.request(method, path, json.dumps(body) if body else None, headers)
    answer = connection.getresponse()
    content = answer.read().decode()
    assert answer.status == 200, content
    is_json = answer.getheader("content-type", "").startswith("application/json")
    return answer.headers, json.loads(content) if is_json else content


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Clients:
    """Threads that send requests until they are stopped, and check each answer."""

    def __init__(self, port: int, rewards: dict[str | None, list[float]], count: int = 3) -> None:
        self._port, self._rewards, self._ended = port, rewards, threading.Event()
        self.digests: list[str] = []
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        connection = connected(self._port)
        request = {"query": QUERY, "documents": DOCUMENTS}
        while not self._ended.is_set() and not self.failures:
            try:
                headers, body = ask(connection, "POST", "/v1/rerank", request)
                results = sorted(body["results"], key=lambda one: one["index"])
                found = [one["relevance_score"] for one in results]
                assert found == self._rewards[headers["x-bundle-digest"]]
                self.digests.append(headers["x-bundle-digest"])
            except BaseException as error:
                self.failures.append(error)
        connection.close()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path]
) -> Iterator[tuple[Any, int, Path]]:
    link = tmp_path_factory.mktemp("links") / "current"
    place(folders[0], link)
    with running(link, "--response-cache-mb", "1", "--log-format", "off") as (process, port):
        yield process, port, link


def test_no_request_fails_while_bundles_are_replaced(
    server: tuple[Any, int, Path],
    folders: tuple[Path, Path],
    rewards: dict[str | None, list[float]],
) -> None:
    process, port, link = server
    with closing(connected(port)) as probe, Clients(port, rewards) as clients:
        for number in range(SWAPS):
            digest = place(folders[(number + 1) % 2], link)
            before = len(clients.digests)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda digest=digest: served(probe) == digest)  # type: ignore[misc]
            wait_for(lambda before=before: len(clients.digests) > before + 5)  # type: ignore[misc]
            assert ask(probe, "GET", "/readyz")
        metrics = ask(probe, "GET", "/metrics")[1]
    assert not clients.failures
    assert set(clients.digests) == set(rewards)
    assert f'logratio_reloads_total{{bundle="default"}} {SWAPS}.0' in metrics


def served(connection: HTTPConnection) -> str:
    return str(ask(connection, "GET", "/v1/models")[1]["data"][0]["digest"])


def test_a_damaged_bundle_is_refused_and_the_old_one_stays(
    server: tuple[Any, int, Path],
    folders: tuple[Path, Path],
    rewards: dict[str | None, list[float]],
    tmp_path: Path,
) -> None:
    process, port, link = server
    with closing(connected(port)) as probe:
        before = served(probe)
    other = next(one for one in folders if digest_of(manifest_bytes(one)) != before)
    damaged = Path(shutil.copytree(other, tmp_path / "damaged"))
    content = bytearray((damaged / GRAPH).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / GRAPH).write_bytes(content)

    def failures() -> str:
        lines = ask(probe, "GET", "/metrics")[1].splitlines()
        found = [one for one in lines if one.startswith("logratio_reload_failures_total")]
        return str(found[0])

    with closing(connected(port)) as probe, Clients(port, rewards, 1) as clients:
        for count, folder in enumerate((damaged, tmp_path / "nowhere"), 1):
            place_link(folder, link)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda count=count: failures().endswith(f" {count}.0"))  # type: ignore[misc]
            assert served(probe) == before
        place(other, link)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: served(probe) != before)
    assert not clients.failures
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    lines = process.stderr.read().splitlines()
    refused = [line for line in lines if "is not replaced" in line]
    assert len(refused) == 2 and all(before in line for line in refused)
    assert "bundle default is not replaced" in refused[0] and GRAPH in refused[0]


def place_link(folder: Path, link: Path) -> None:
    link.unlink()
    link.symlink_to(folder)


def test_another_digest_than_the_expected_one_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    link = tmp_path / "current"
    expected = place(folders[0], link)
    with running(link, "--expect", expected) as (process, port):
        place(folders[1], link)
        process.send_signal(signal.SIGHUP)
        line = process.stderr.readline()  # type: ignore[union-attr]
        assert "is not replaced" in line and "digest" in line
        with closing(connected(port)) as probe:
            assert served(probe) == expected


def test_a_replaced_bundle_is_freed_after_its_last_request(folders: tuple[Path, Path]) -> None:
    reranker = Reranker.load(folders[0])
    old, session = weakref.ref(reranker), weakref.ref(vars(reranker)["_session"])
    app = create_app(reranker, response_cache_mb=1)
    with TestClient(app) as client:
        service = app.state.bundles.of(None)  # as a request in flight
        request = {"query": QUERY, "documents": DOCUMENTS}
        assert client.post("/v1/rerank", json=request).status_code == 200
        new = Reranker.load(folders[1])
        app.state.bundles.replace("", new)
        assert client.post("/v1/rerank", json=request).headers["x-bundle-digest"] == new.digest
        del reranker
        gc.collect()
        assert service.reranker is old()
        del service
        gc.collect()
        assert old() is None and session() is None
