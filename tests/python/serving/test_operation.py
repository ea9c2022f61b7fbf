"""A server process: where its settings come from, TLS, CORS, and how it starts and stops."""

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
import uvicorn
from repository import ROOT
from running_server import running
from starlette.testclient import TestClient
from tiny_bundle import tiny_bundle

from logratio.cli.app import app as commands
from logratio.errors import ConfigError, LogratioError, MissingInputError
from logratio.serving import Reranker
from logratio.serving.candidates import CandidateGroup
from logratio.serving.config import ServeConfig
from logratio.serving.keys import VARIABLE
from logratio.serving.limits import ERRORS, Limits
from logratio.serving.runs import Run
from logratio.serving.scores import Sums
from logratio.serving.server import create_app, make_server, within_open_files
from logratio.serving.session import Stop

KEY = "a-key-of-these-tests"
BODY = json.dumps({"query": "the cat", "documents": ["sad", "happy"]})
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


def status(port: int, method: str = "GET", path: str = "/readyz", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, BODY if method == "POST" else None, JSON | named)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def parameters() -> dict[str, Any]:
    """The options of `serve`, by the names of their parameters."""
    group: Any = typer.main.get_command(commands)
    return {one.name: one for one in group.commands["serve"].params if one.name != "help"}


def test_every_setting_is_a_flag_a_variable_and_a_key_of_the_file(tmp_path: Path) -> None:
    found = parameters()
    assert found.keys() - {"config"} == {field.name for field in fields(ServeConfig)}
    for field in fields(ServeConfig):
        assert f"--{field.name.replace('_', '-')}" in found[field.name].opts
        assert found[field.name].envvar == f"LOGRATIO_{field.name.upper()}"
        if field.default is not MISSING:
            assert found[field.name].default == field.default, field.name
    file = tmp_path / "serve.yaml"
    config = ServeConfig("bundle", port=1, cors_origin=("https://a.example",), no_auth=True)
    file.write_text(config.to_yaml())
    assert ServeConfig.from_yaml(file) == config


def test_the_table_of_settings_is_complete() -> None:
    page = (ROOT / "python/docs/operating.md").read_text()
    table = page.partition("| flag | default | meaning |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[1:]]
    shown = {row[0]: row[1] for row in rows}
    expected = {"`--config`": ""}
    for field in fields(ServeConfig):
        value = field.default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        cell = "" if value is MISSING else f"{value:g}" if is_number else f"{value or ''}"
        expected[f"`--{field.name.replace('_', '-')}`"] = cell
    assert shown == expected


def test_the_table_of_errors_is_complete() -> None:
    page = (ROOT / "python/docs/operating.md").read_text()
    for status, codes in ERRORS.items():
        for code, meaning in codes.items():
            assert f"\n| {status} | `{code}` | {meaning} |\n" in page


def test_flags_override_variables_and_variables_override_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[ServeConfig] = []
    monkeypatch.setattr("logratio.serving.server.serve", seen.append)
    file = tmp_path / "serve.yaml"
    file.write_text(
        "bundle: from-file\nport: 1001\nhost: 127.0.0.1\nlog_format: json\ndrain-seconds: 3\n"
        "cors_origin: [https://a.example, https://b.example]\nno_auth: true\n"
    )
    monkeypatch.setenv("LOGRATIO_CONFIG", str(file))
    monkeypatch.setenv("LOGRATIO_PORT", "1002")
    monkeypatch.setenv("LOGRATIO_LOG_FORMAT", "off")
    monkeypatch.setenv("LOGRATIO_ALLOW_FALLBACK", "true")
    group = typer.main.get_command(commands)
    group.main(["serve", "--port", "1003"], standalone_mode=False)
    assert seen == [
        ServeConfig(
            "from-file",
            port=1003,
            log_format="off",
            drain_seconds=3.0,
            cors_origin=("https://a.example", "https://b.example"),
            no_auth=True,
            allow_fallback=True,
        )
    ]
    monkeypatch.setenv("LOGRATIO_CORS_ORIGIN", "https://c.example https://d.example")
    group.main(["serve"], standalone_mode=False)
    assert seen[-1].cors_origin == ("https://c.example", "https://d.example")
    assert seen[-1].port == 1002


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"port": 70_000}, ConfigError, "port"),
        ({"tls_cert": "a"}, ConfigError, "belong together"),
        ({"cors_origin": ("*",)}, ConfigError, "is not an origin"),
        ({"cors_origin": ("https://a.example/",)}, ConfigError, "is not an origin"),
        ({"log_format": "xml"}, ConfigError, "log_format"),
        ({"shutdown_seconds": 0}, ConfigError, "shutdown_seconds"),
        ({"run_tokens": 20_000}, ConfigError, "run_tokens must be at least 1 and at most 16384"),
        ({"max_concurrent_requests": 0}, ConfigError, "max_concurrent_requests"),
        ({"max_concurrent_requests": 600}, ConfigError, "600, but with max_connections 512"),
        ({"max_connections": 100}, ConfigError, "lower the first or raise the second"),
        ({"queue_seconds": -1.0}, ConfigError, "queue_seconds"),
        ({"header_seconds": 0.0}, ConfigError, "header_seconds"),
        ({"body_seconds": float("inf")}, ConfigError, "body_seconds"),
        ({"idle_seconds": 0.0}, ConfigError, "idle_seconds"),
    ],
)
def test_bad_settings_are_refused(
    settings: dict[str, Any], error: type[LogratioError], words: str
) -> None:
    with pytest.raises(error, match=words):
        ServeConfig("bundle", **settings)


def test_limits_are_those_of_the_settings() -> None:
    config = ServeConfig(
        "bundle",
        run_tokens=1,
        max_concurrent_requests=2,
        queue_seconds=3.0,
        max_connections=4,
        header_seconds=5.0,
        body_seconds=6.0,
        idle_seconds=7.0,
        max_request_tokens=8,
        request_seconds=9.0,
        shutdown_seconds=10,
    )
    assert config.limits(Limits(documents=11)) == Limits(
        run_tokens=1,
        queue=2,
        queue_seconds=3.0,
        connections=4,
        header_seconds=5.0,
        body_seconds=6.0,
        idle_seconds=7.0,
        request_tokens=8,
        seconds=9.0,
        shutdown_seconds=10,
        documents=11,
    )
    assert ServeConfig("bundle").limits() == Limits()


def read_to_the_end(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(4096):
        parts.append(part)
    return b"".join(parts)


def test_a_server_has_the_limits_of_its_flags(folder: Path) -> None:
    flags = ("--run-tokens", "1", "--max-connections", "1", "--max-concurrent-requests", "1")
    seconds = ("--header-seconds", "1", "--body-seconds", "1", "--idle-seconds", "1")
    with running(folder, *flags, *seconds) as (_, port):
        documents = [f"sad {'happy ' * count}" for count in range(12)]  # more tokens than 4 prompts
        body = json.dumps({"query": "the", "documents": documents}).encode()
        head = b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        whole = head + b"content-length: %d\r\n\r\n" % len(body)
        for sent, status_line in [
            (whole + body, b"HTTP/1.1 200"),  # idle afterwards
            (whole + body[:-1], b"HTTP/1.1 408"),
            (head, b"HTTP/1.1 408"),
        ]:
            with socket.create_connection(("127.0.0.1", port), 20) as connection:
                connection.sendall(sent)
                start = time.monotonic()
                assert read_to_the_end(connection).startswith(status_line)
                assert time.monotonic() - start < 9  # the default of headers is 10 s
        metrics = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        metrics.request("GET", "/metrics")
        text = metrics.getresponse().read().decode()
        (runs,) = re.findall(r'^logratio_runs_total\{bundle="default"\} (\S+)$', text, re.M)
        assert float(runs) >= 3
        held = socket.create_connection(("127.0.0.1", port), 20)
        held.sendall(whole)
        crowded = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        crowded.request("GET", "/version")
        assert crowded.getresponse().status == 503
        for client in (metrics, crowded, held):
            client.close()


def test_fewer_connections_than_asked_for_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1024))
    limits = Limits(connections=2000, queue=300)
    assert within_open_files(limits) == replace(limits, connections=1024 - 64 - 16)
    assert "max_connections is 944 instead of 2000, because" in capsys.readouterr().err
    assert within_open_files(Limits()) == Limits()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags", [["--host", "0.0.0.0"], ["--api-key-file", "nowhere"]])
def test_an_unsafe_start_is_refused_before_the_bundle_is_read(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "logratio", "serve", "--bundle", "nowhere", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert flags[1] in done.stderr and "--api-key-file" in done.stderr


def test_a_process_with_keys_and_a_json_log(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    flags = ("--api-key-file", str(file), "--log-format", "json")
    with running(folder, *flags, **{VARIABLE: "another-key-of-these-tests"}) as (process, port):
        assert status(port) == 200
        assert status(port, "POST", "/v1/rerank") == 401
        assert status(port, "POST", "/v1/rerank", x_api_key=KEY, x_request_id="one") == 200
        assert status(port, "GET", "/metrics", authorization=f"Bearer {KEY}") == 200
        assert status(port, "GET", "/metrics", x_api_key="another-key-of-these-tests") == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [(line["status"], line.get("cause")) for line in lines] == [
        *((401, "unauthorized"), (200, None)),
    ]
    assert lines[1]["id"] == "one"
    assert KEY not in json.dumps(lines)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem", folder / "key.pem"


def test_https_is_served_with_the_certificate(folder: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    flags = ("--tls-cert", str(cert), "--tls-key", str(key))
    with running(folder, *flags, address="https://127.0.0.1") as (process, port):
        context = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        connection.request("POST", "/v1/rerank", BODY, JSON)
        response = connection.getresponse()
        assert response.status == 200
        assert len(json.loads(response.read())["results"]) == 2
        connection.close()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            status(port)  # plain HTTP
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_certificate_that_cannot_be_used_is_refused(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    ServeConfig("bundle", tls_cert=cert, tls_key=key).check_certificate()
    with pytest.raises(MissingInputError, match="tls_key"):
        ServeConfig("bundle", tls_cert=cert, tls_key=tmp_path / "none").check_certificate()
    with pytest.raises(ConfigError, match="without a password"):
        ServeConfig("bundle", tls_cert=key, tls_key=cert).check_certificate()
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigError, match="without a password"):
        ServeConfig("bundle", tls_cert=cert, tls_key=locked).check_certificate()


def test_only_the_given_origins_may_send_requests_from_pages(folder: Path) -> None:
    app = create_app(Reranker.load(folder), cors_origins=["https://a.example"])
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    with TestClient(app) as client:
        for origin, is_allowed in (("https://a.example", True), ("https://b.example", False)):
            headers = {"origin": origin}
            answer = client.options("/v1/rerank", headers=headers | asked)
            assert (answer.status_code == 200) == is_allowed
            answer = client.post("/v1/rerank", content=BODY, headers=headers | JSON)
            assert answer.headers.get("access-control-allow-origin") == (
                origin if is_allowed else None
            )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_draining_server_is_not_ready_and_still_accepts_requests(folder: Path) -> None:
    with running(folder, "--drain-seconds", "600") as (process, port):
        assert status(port) == 200
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: status(port) == 503)
        assert status(port, "POST", "/v1/rerank") == 200
        assert status(port, "GET", "/livez") == 200
        process.send_signal(signal.SIGTERM)  # a second one ends the drain
        assert process.wait(20) == 0


def test_the_drain_ends_after_its_time(folder: Path) -> None:
    with running(folder, "--drain-seconds", "1") as (process, port):
        assert status(port) == 200  # during the start, a signal ends it at once
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert time.monotonic() - start > 0.9


class StuckReranker(Reranker):
    """Computes until it is stopped, once it is loaded."""

    is_stuck, entered = threading.Event(), threading.Event()

    def compute(
        self, groups: Sequence[CandidateGroup], run: Run, stop: Stop | None = None
    ) -> list[Sums]:
        if not self.is_stuck.is_set():
            return super().compute(groups, run, stop)
        self.entered.set()
        assert stop is not None
        while not stop.asked:
            time.sleep(0.01)
        raise RuntimeError("stopped")


def test_a_request_that_outlasts_the_shutdown_is_refused(folder: Path) -> None:
    limits = Limits(shutdown_seconds=4)
    reranker = StuckReranker.load(folder)
    app = create_app(reranker, limits)
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(uvicorn, app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    StuckReranker.is_stuck.set()
    connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1], timeout=60)
    connection.request("POST", "/v1/rerank", BODY, JSON)
    assert StuckReranker.entered.wait(20)
    server.should_exit = True
    with connection.getresponse() as response:
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert json.load(response)["error"]["code"] == "draining"
    connection.close()
    thread.join(20)
    assert not thread.is_alive()


SLOW_START = """
import signal, sys, threading, time
from logratio.serving import server
from logratio.serving.config import ServeConfig
from logratio.serving.session import within

def load(bundles):
    if sys.argv[1:]:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    return within(600, wait_for_ever, "")

def wait_for_ever():
    time.sleep(0.5)  # the first thread waits now
    print("loading", flush=True)
    time.sleep(600)

server.ConfiguredBundles.load_all = load
server.serve(ServeConfig("bundle", port=0))
"""


@pytest.mark.parametrize("thread", [(), ("another thread",)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it(number: signal.Signals, thread: tuple[str, ...]) -> None:
    """Also if it wakes another thread, or reaches the first one just before it waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_START, *thread],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        expected = {signal.SIGTERM: {0}, signal.SIGINT: {-signal.SIGINT, 130, 1}}[number]
        assert process.wait(20) in expected
    finally:
        process.kill()
        process.communicate()


def as_pid_1(*command: str) -> list[str]:
    """Return a command that is process 1 of a namespace, where SIGTERM needs a handler."""
    return ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", *command]


def test_sigterm_during_the_start_ends_process_1(tmp_path: Path) -> None:
    if subprocess.run(as_pid_1("true"), capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no namespaces of processes")
    script = tmp_path / "start.py"
    script.write_text(SLOW_START)
    process = subprocess.Popen(
        as_pid_1(sys.executable, str(script)), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
