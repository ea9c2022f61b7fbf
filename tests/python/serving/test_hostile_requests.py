"""Hostile requests to a server process: smuggling, sizes, nesting, encodings, and the network."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT
from running_server import running
from tiny_bundle import tiny_bundle

from logratio.extras import require
from logratio.serving.connections import HEAD_BYTES

BODY = b'{"query": "the cat", "documents": ["sad"]}'
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
POST = b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
SMUGGLED = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
CANARY = b"xyzzy-canary"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with running(folder, "--log-format", "off") as (_, port):
        yield port


def answers(port: int, content: bytes) -> list[bytes]:
    """Send bytes, and return the answers up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.settimeout(20)
        parts = []
        try:
            connection.sendall(content)
            while part := connection.recv(65536):
                parts.append(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
    return b"".join(parts).split(b"HTTP/1.1 ")[1:]


SMUGGLING = {
    "length and encoding": POST + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "encoding and length": POST + CHUNKED + LENGTH + b"\r\n" + CHUNKS,
    "two lengths": POST + b"content-length: 5\r\n" + LENGTH + b"\r\n" + BODY,
    "signed length": POST + b"content-length: +42\r\n\r\n" + BODY,
    "negative length": POST + b"content-length: -1\r\n\r\n" + BODY,
    "hexadecimal length": POST + b"content-length: 0x2a\r\n\r\n" + BODY,
    "length with an underscore": POST + b"content-length: 4_2\r\n\r\n" + BODY,
    "unknown encoding": POST + b"transfer-encoding: xchunked\r\n\r\n" + CHUNKS,
    "two encodings": POST + CHUNKED + b"transfer-encoding: identity\r\n\r\n" + CHUNKS,
    "space before the colon": POST + b"transfer-encoding : chunked\r\n\r\n" + CHUNKS,
    "control character": POST + b"transfer-encoding: \x0bchunked\r\n\r\n" + CHUNKS,
    "folded line": POST + b"x: a\r\n transfer-encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "folded with a tab": POST + b"x: a\r\n\tb\r\n" + LENGTH + b"\r\n" + BODY,
    "lines without CR": (POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "one line without CR": POST + b"x: a\n" + LENGTH + b"\r\n" + BODY,
    "CR within a line": POST + b"x: a\rtransfer-encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "NUL": POST + b"x: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "no host": b"GET /version HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /version HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "signed chunk": POST + CHUNKED + b"\r\n+" + CHUNKS,
    "chunk that is no number": POST + CHUNKED + b"\r\nzz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk of an enormous size": POST + CHUNKED + b"\r\n" + b"f" * 40 + b"\r\n" + BODY,
    "long header": b"GET /version HTTP/1.1\r\nhost: x\r\nx: " + b"a" * HEAD_BYTES + b"\r\n\r\n",
    "long path": b"GET /" + b"a" * HEAD_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "many headers": b"GET /version HTTP/1.1\r\nhost: x\r\n" + b"x: a\r\n" * 4000 + b"\r\n",
    "HTTP/0.9": b"GET /version\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_an_ambiguous_request_is_refused_and_nothing_after_it_is_read(port: int, name: str) -> None:
    (answer,) = answers(port, SMUGGLING[name] + SMUGGLED)
    assert answer.startswith(b"400 ")
    assert b"connection: close" in answer.lower()


def test_a_second_request_on_the_connection_is_checked_too(port: int) -> None:
    first, second = answers(port, SMUGGLED + SMUGGLING["length and encoding"] + SMUGGLED)
    assert (first[:4], second[:4]) == (b"200 ", b"400 ")


def test_a_head_that_arrives_in_pieces_is_checked_too(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.settimeout(20)
        for piece in (POST + b"x: a\r", b"\n", b" b\r\n", LENGTH + b"\r", b"\n", BODY):
            connection.sendall(piece)
            time.sleep(0.05)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_sound_requests_of_every_kind_are_answered(port: int) -> None:
    """What a strict parser must still accept: chunks, pipelining, long but permitted headers."""
    long = b"GET /version HTTP/1.1\r\nhost: x\r\nx: " + b"a" * (HEAD_BYTES - 100) + b"\r\n\r\n"
    sent = [
        POST + CHUNKED + b"\r\n" + CHUNKS,
        POST + LENGTH + b"\r\n" + BODY,
        POST + LENGTH + LENGTH + b"\r\n" + BODY,  # the same length twice is permitted
        long,
        b"GET /version HTTP/1.1\r\nHost:x\r\nX:\r\n\r\n",
        LAST,
    ]
    found = answers(port, b"".join(sent))
    assert [answer[:4] for answer in found] == [b"200 "] * len(sent)


def test_bytes_of_a_body_are_not_taken_for_headers(port: int) -> None:
    """A body of another type is refused, but read as a body: the next request is answered."""
    body = b"content-length: 1\n transfer-encoding: chunked\n\n"
    head = POST.replace(b"json", b"x") + b"content-length: %d\r\n\r\n" % len(body)
    found = answers(port, head + body + LAST)
    assert [answer[:4] for answer in found] == [b"422 ", b"200 "]


def rerank(port: int, body: bytes) -> tuple[bytes, float]:
    """Post a body, and return the answer and its seconds."""
    start = time.perf_counter()
    head = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    (answer,) = answers(port, head + body)
    return answer, time.perf_counter() - start


def nested(depth: int, opening: bytes, closing: bytes) -> bytes:
    return b'{"query": ' + opening * depth + b"1" + closing * depth + b', "documents": ["a"]}'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (nested(100_000, b"[", b"]"), b"422"),
        (nested(100_000, b'{"a": ', b"}"), b"422"),
        (b'{"query": "a", "documents": [' + b'"b",' * 99_999 + b'"b"]}', b"422"),
        (b'{"query": "a", "documents": [' + b'{"text": "b"},' * 99_999 + b'"b"]}', b"422"),
        (b'{"query": "a\xff\xfe", "documents": ["b"]}', b"422"),
        (b'{"query": "\xed\xa0\x80", "documents": ["b"]}', b"422"),
        (b'{"query": "\xc0\x80", "documents": ["b"]}', b"422"),
        (b'{"query": "a", "documents": ["b"], "top_n": 1e999}', b"422"),
        (b'{"query": "a", "documents": ["b"], "top_n": NaN}', b"422"),
        (b'{"query": "' + b"a" * 2**21 + b'", "documents": ["b"]}', b"413"),
    ],
    ids=lambda value: value.decode(errors="replace")[:40].encode("ascii", "replace").decode(),
)
def test_a_hostile_body_is_refused_quickly_without_its_text(
    port: int, body: bytes, status: bytes
) -> None:
    answer, seconds = rerank(port, body.replace(b'"documents"', b'"%b": 1, "documents"' % CANARY))
    assert answer[:3] in (status, b"400")
    assert CANARY not in answer
    assert seconds < 10
    assert answers(port, LAST)[0].startswith(b"200 ")


def test_the_server_connects_to_nothing(folder: Path, tmp_path: Path) -> None:
    """In a network namespace without a route, and (with strace) by its system calls."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this machine allows no network namespaces")
    script = ROOT / "benches" / "load_isolated.py"
    done = subprocess.run(
        [*alone, sys.executable, str(script), str(folder), str(tmp_path / "log")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    assert found["isolated"]
    assert found["statuses"] == [200, 422, 200]
    assert found["connected"] == []


def test_telemetry_of_onnx_runtime_is_off_unless_the_user_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    require("onnxruntime", "rank")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    require("onnxruntime", "rank")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
