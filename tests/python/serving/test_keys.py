"""API keys: which are accepted, where they are read, and that nothing shows them."""

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tiny_bundle import tiny_bundle

from logratio.errors import ConfigError, MissingInputError
from logratio.serving import Reranker
from logratio.serving.config import ServeConfig
from logratio.serving.keys import VARIABLE, Keys, read_keys
from logratio.serving.server import create_app

FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"
REQUEST = {"query": "the cat", "documents": ["sad", "happy"]}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    reranker = Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")
    with TestClient(create_app(reranker, keys=Keys([FIRST, SECOND]))) as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {FIRST}"},
        {"authorization": f"bearer  {SECOND}"},
        {"x-api-key": SECOND},
        {"authorization": "Basic dTpw", "x-api-key": FIRST},
    ],
)
def test_each_key_is_accepted_in_each_header(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/v1/rerank", json=REQUEST, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": FIRST},
        {"authorization": f"Basic {FIRST}"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {FIRST[:-1]}"},
        {"authorization": f"Bearer {FIRST}x"},
        {"authorization": f"Bearer {hashlib.sha256(FIRST.encode()).hexdigest()}"},
        {"authorization": "Bearer wrong", "x-api-key": FIRST},
        {"x-api-key": ""},
    ],
)
@pytest.mark.parametrize("path", ["/v1/rerank", "/metrics", "/openapi.json", "/no-such-path"])
def test_other_requests_get_the_same_401(
    client: TestClient, headers: dict[str, str], path: str
) -> None:
    response = client.post(path, json=REQUEST, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json() == {
        "error": {"code": "unauthorized", "message": "a valid API key is needed"}
    }


def test_probes_need_no_key(client: TestClient) -> None:
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 200


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    keys = Keys([FIRST, SECOND, FIRST])
    monkeypatch.setattr(hmac, "compare_digest", counted)
    for given in (FIRST, SECOND, "x" * 10_000, ""):
        compared.clear()
        assert keys.accepts(given.encode()) == (given in (FIRST, SECOND))
        assert len(compared) == 2
        assert {len(one) for pair in compared for one in pair} == {32}


def test_only_hashes_are_kept() -> None:
    keys = Keys([FIRST])
    assert FIRST not in repr(vars(keys))
    assert len(keys) == 1


def test_keys_come_from_the_file_and_the_variable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the first team\n\n  {FIRST}  \n")
    keys = read_keys(file, {VARIABLE: f"{SECOND}, another-key-0123456789"})
    assert len(keys) == 3
    assert keys.accepts(FIRST.encode()) and keys.accepts(SECOND.encode())
    assert len(read_keys(None, {})) == 0


@pytest.mark.parametrize(
    "content", ["", "# only a comment\n", "short\n", "a key with spaces 123\n"]
)
def test_a_file_without_good_keys_is_refused_without_showing_them(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_keys(file, {})
    assert str(file) in str(caught.value)
    assert "short" not in str(caught.value) and "with spaces 123" not in str(caught.value)
    with pytest.raises(ConfigError, match=VARIABLE):
        read_keys(None, {VARIABLE: " , "})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="api_key_file"):
        read_keys(tmp_path / "none", {})


@pytest.mark.parametrize(
    ("host", "no_auth", "has_keys", "is_refused"),
    [
        ("127.0.0.1", False, False, False),
        ("::1", False, False, False),
        ("localhost", False, False, False),
        ("0.0.0.0", False, False, True),
        ("::", False, False, True),
        ("a.example", False, False, True),
        ("0.0.0.0", True, False, False),
        ("0.0.0.0", False, True, False),
        ("127.0.0.1", True, True, True),
    ],
)
def test_other_machines_are_served_only_with_keys_or_no_auth(
    host: str, no_auth: bool, has_keys: bool, is_refused: bool
) -> None:
    config: Any = ServeConfig("bundle", host=host, no_auth=no_auth)
    if is_refused:
        with pytest.raises(ConfigError, match="no_auth"):
            config.check_access(has_keys)
    else:
        config.check_access(has_keys)
