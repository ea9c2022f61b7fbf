"""Several processes behind one address: shared metrics, restarts, signals, and a common end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast

import pytest
from running_server import running
from tiny_bundle import copy_bundle, tiny_bundle

from logratio.bundle import GRAPH
from logratio.errors import ConfigError
from logratio.serving import worker_processes
from logratio.serving.config import ServeConfig
from logratio.serving.limits import Limits

BODY = json.dumps({"query": "the cat", "documents": ["sad", "happy"]})
QUIET = ("--workers", "2", "--log-format", "off")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with running(folder, *QUIET) as found:
        yield found


def fetch(port: int, method: str = "GET", path: str = "/readyz") -> tuple[int, str]:
    """Status and body of a request on a new connection, which any worker may accept."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    body = BODY if method == "POST" else None
    connection.request(method, path, body, {"content-type": "application/json"})
    try:
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def count(port: int, name: str) -> float:
    """The value of a metric; the sum over its labels."""
    text = fetch(port, path="/metrics")[1]
    return sum(float(one) for one in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    """The workers of a server: its children that serve."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(one) for one in found if "spawn_main" in command_of(int(one))]


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_the_workers_share_requests_and_metrics(server: Any) -> None:
    _, port = server
    before = count(port, 'logratio_requests_total{route="/v1/rerank",status="200"}')
    assert {fetch(port, "POST", "/v1/rerank")[0] for _ in range(30)} == {200}
    for _ in range(6):  # whichever worker answers
        assert count(port, "logratio_request_seconds_count") >= 30
        text = fetch(port, path="/metrics")[1]
        assert f'logratio_requests_total{{route="/v1/rerank",status="200"}} {before + 30}' in text
        assert text.count("logratio_bundle_info{") == 1
        assert count(port, "logratio_in_flight") == 0


def test_each_worker_computes_with_its_share_of_the_cpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings that reach the workers, which are processes and threads otherwise."""
    seen: list[ServeConfig] = []
    monkeypatch.setattr("os.setsid", lambda: None)
    monkeypatch.setattr(worker_processes, "Thread", lambda **_: Quiet())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(worker_processes, "default_threads", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    ours, theirs = socket.socketpair()
    for threads, number, provider in ((None, 0, None), (3, 1, "CUDAExecutionProvider")):
        config = ServeConfig(folder, workers=2, threads=threads, provider=provider)

        def serve(_: Any, config: ServeConfig, *__: Any) -> None:
            seen.append(config)

        task = worker_processes._Task(serve, number, ours, config, Limits(), 0, theirs)  # type: ignore[arg-type]
        worker_processes._work(task)
    ours.close()
    theirs.close()
    assert [config.threads for config in seen] == [4, 3]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


class Quiet:
    def start(self) -> None:
        """No thread."""


def test_a_worker_that_dies_is_started_again_and_counted(server: Any) -> None:
    process, port = server
    wait_for(lambda: len(children(process.pid)) == 2)
    before, requests = children(process.pid), count(port, "logratio_requests_total")
    os.kill(before[0], signal.SIGKILL)
    wait_for(lambda: before[0] not in children(process.pid))
    for _ in range(5):  # the other one answers meanwhile
        assert fetch(port, "POST", "/v1/rerank")[0] == 200
    wait_for(lambda: count(port, "logratio_worker_restarts_total") == 1)
    after = children(process.pid)
    assert len(after) == 2 and before[1] in after
    assert count(port, "logratio_requests_total") > requests  # what it had counted stays
    line = process.stderr.readline()
    assert f"process {before[0]}) ended with -9; it is started again" in line


def test_sigterm_stops_the_workers_and_then_the_parent(server: Any) -> None:
    process, port = server
    workers = children(process.pid)
    temporary = [Path(one) for one in metrics_folders(workers[0])]
    assert temporary and all(one.is_dir() for one in temporary)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not any(map(command_of, workers))
    assert not any(one.exists() for one in temporary)
    with pytest.raises(ConnectionRefusedError):
        fetch(port)


def metrics_folders(process: int) -> list[str]:
    """The folder of shared metrics, from the environment of a worker."""
    environment = Path(f"/proc/{process}/environ").read_text()
    return re.findall(r"PROMETHEUS_MULTIPROC_DIR=([^\0]+)", environment)


def test_ctrl_c_ends_a_drain(folder: Path) -> None:
    with running(folder, *QUIET, "--drain-seconds", "600") as (process, port):
        workers = children(process.pid)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: {fetch(port)[0] for _ in range(8)} == {503})
        assert fetch(port, "POST", "/v1/rerank")[0] == 200
        process.send_signal(signal.SIGINT)  # ends the drain
        assert process.wait(30) == 130
        assert not any(map(command_of, workers))


def test_the_workers_end_if_the_parent_is_killed(folder: Path) -> None:
    with running(folder, *QUIET) as (process, port):
        workers = children(process.pid)
        (temporary,) = metrics_folders(workers[0])
        process.kill()
        process.wait(30)
        wait_for(lambda: not any(map(command_of, workers)))
        assert not Path(temporary).exists()
        with pytest.raises(ConnectionRefusedError):
            fetch(port)


def test_a_bundle_that_cannot_be_loaded_ends_the_start_with_its_reason(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    damaged = copy_bundle(tmp_path_factory, tmp_path / "damaged")
    (damaged / GRAPH).write_bytes(b"")
    done = subprocess.run(
        [*(sys.executable, "-m", "logratio", "serve", "--port", "0", "--workers", "2"),
         *("--bundle", damaged)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and GRAPH in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.mkdtemp", none)
    config, unused = ServeConfig("bundle", workers=2), cast(Any, None)
    with pytest.raises(ConfigError, match="TMPDIR"):
        worker_processes.serve_in_processes(unused, unused, config, Limits(), print)
