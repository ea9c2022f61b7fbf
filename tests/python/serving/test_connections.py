"""Silent and slow connections on real sockets are closed, and probes are always answered."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from tiny_bundle import tiny_bundle

from logratio.serving import Reranker
from logratio.serving.limits import Limits
from logratio.serving.server import create_app, make_server

LIMITS = Limits(connections=6, probe_connections=3, header_seconds=1.0, body_seconds=1.0)
GET = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tiny_bundle(tmp_path_factory) / "bundle"
    app = create_app(Reranker.load(folder), LIMITS)

    @app.get("/held")
    async def held() -> None:
        time.sleep(1.0)  # nothing else is read or accepted meanwhile

    listener = socket.create_server(("127.0.0.1", 0))
    running = make_server(uvicorn, app, LIMITS)
    running.install_signal_handlers = lambda: None
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield SimpleNamespace(port=listener.getsockname()[1], running=running)
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def connected(server: Any) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", server.port), 10)
    made.settimeout(10)
    return made


def answer(connection: socket.socket) -> bytes:
    """Read up to the end, even if the other side resets the connection."""
    parts = []
    try:
        while part := connection.recv(4096):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def probe(server: Any) -> bytes:
    with connected(server) as connection:
        connection.sendall(GET)
        return answer(connection)


def test_probes_are_answered_despite_many_silent_connections(server: Any) -> None:
    silent = [connected(server) for _ in range(30)]
    try:
        for _ in range(3):
            assert probe(server).startswith(b"HTTP/1.1 200")
    finally:
        for connection in silent:
            connection.close()


def test_probes_have_places_of_their_own_if_every_connection_has_a_request(server: Any) -> None:
    head = b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
    busy = [connected(server) for _ in range(LIMITS.connections)]
    try:
        for connection in busy:
            connection.sendall(head + b"content-type: application/json\r\n\r\n{")
        time.sleep(0.2)  # until their headers have been read
        assert probe(server).startswith(b"HTTP/1.1 200")
        with connected(server) as connection:
            connection.sendall(GET.replace(b"/livez", b"/version"))
            assert answer(connection).startswith(b"HTTP/1.1 503")
    finally:
        for connection in busy:
            connection.close()


def test_a_silent_connection_is_closed(server: Any) -> None:
    with connected(server) as connection:
        start = time.monotonic()
        assert answer(connection) == b""
        assert time.monotonic() - start < 5


def test_slow_headers_time_out(server: Any) -> None:
    with connected(server) as connection:
        start = time.monotonic()
        found = b""
        try:
            for byte in GET[:-2] * 3:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = answer(connection)
        assert time.monotonic() - start < 8
        assert found == b"" or found.startswith(b"HTTP/1.1 408")


def test_a_slow_body_times_out(server: Any) -> None:
    with connected(server) as connection:
        head = b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
        connection.sendall(head + b"content-type: application/json\r\n\r\n{")
        assert answer(connection).startswith(b"HTTP/1.1 408")


def test_requests_after_the_crowd_are_served(server: Any) -> None:
    body = b'{"query": "the cat", "documents": ["sad", "happy"]}'
    head = b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with connected(server) as connection:
        connection.sendall(head + body)
        assert answer(connection).startswith(b"HTTP/1.1 200")


def test_connections_without_a_request_do_not_take_the_place_of_one_in_use(server: Any) -> None:
    with connected(server) as kept:
        kept.sendall(GET.replace(b"connection: close\r\n", b""))
        assert kept.recv(4096).startswith(b"HTTP/1.1 200")
        silent = [connected(server) for _ in range(3 * LIMITS.connections)]
        try:
            assert answer(silent[0]) == b""  # another was closed for the last ones
            kept.sendall(GET)
            assert b"HTTP/1.1 200" in answer(kept)
        finally:
            for connection in silent:
                connection.close()


def test_a_request_that_has_arrived_is_answered_among_many_new_connections(server: Any) -> None:
    with connected(server) as holding:
        holding.sendall(GET.replace(b"/livez", b"/held"))
        time.sleep(0.3)
        asking = connected(server)
        asking.sendall(GET)
        # When the server continues, it accepts all of them before it reads anything.
        silent = [connected(server) for _ in range(3 * LIMITS.connections)]
        try:
            assert answer(asking).startswith(b"HTTP/1.1 200")
        finally:
            for connection in (asking, *silent):
                connection.close()


def test_an_answer_is_not_delayed_until_the_client_acknowledges_its_headers(server: Any) -> None:
    with connected(server) as connection:
        connection.sendall(GET.replace(b"connection: close\r\n", b""))
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        (open_one,) = [
            one
            for one in server.running.server_state.connections
            if one.client == connection.getsockname()
        ]
        made = open_one.transport.get_extra_info("socket")
        assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
