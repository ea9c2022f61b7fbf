"""The page at `/`: one file, a strict policy, no key for itself, and a switch."""

import base64
import hashlib
import http.client
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from parsed_page import ParsedPage
from running_server import running
from starlette.testclient import TestClient
from tiny_bundle import tiny_bundle

from logratio.serving import Reranker
from logratio.serving.keys import Keys
from logratio.serving.server import create_app

KEY = "a-key-of-these-tests"
REQUEST = {"groups": [{"prompt": "the cat", "candidates": ["sad"]}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder)


@pytest.fixture(scope="module")
def client(reranker: Reranker) -> Iterator[TestClient]:
    with TestClient(create_app(reranker, keys=Keys([KEY]))) as client:
        yield client


@pytest.fixture(scope="module")
def page(client: TestClient) -> ParsedPage:
    return ParsedPage(client.get("/").text)


def test_the_page_needs_no_key_and_its_requests_do(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.text.startswith("<!doctype html>")
    for path in ("/v1/models", "/page.html", "/index.html", "/openapi.json"):
        assert client.get(path).status_code == 401, path
    assert client.post("/v1/score", json=REQUEST).status_code == 401
    key = {"authorization": f"Bearer {KEY}"}
    assert client.post("/v1/score", json=REQUEST, headers=key).status_code == 200


def test_only_the_pages_own_script_and_style_may_run(client: TestClient, page: ParsedPage) -> None:
    header = client.get("/").headers["content-security-policy"]
    policy = {name: values for name, *values in (part.split() for part in header.split("; "))}
    for kind in ("script", "style"):
        (block,) = page.texts(kind)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy.pop(f"{kind}-src") == [f"'sha256-{digest}'"]
    assert policy == {
        "default-src": ["'none'"],
        "connect-src": ["'self'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }


def test_the_page_has_no_external_part_and_no_inline_handler(page: ParsedPage) -> None:
    assert len(page.elements) > 40
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value == "docs" or value.startswith(("#", "data:")), tag
    (style,), (script,) = page.texts("style"), page.texts("script")
    assert not re.search(r"@import|url\(", style)
    assert not re.search(r"https?:|import\b|\bnew (Worker|WebSocket|EventSource)", script)


def test_the_script_makes_no_markup_from_text_and_stores_nothing(page: ParsedPage) -> None:
    (script,) = page.texts("script")
    assert "textContent" in script
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|\beval\b|new Function"
    storage = r"localStorage|sessionStorage|indexedDB|\bcookie\b"
    assert not re.search(f"{markup}|{storage}|setHTML|createContextualFragment", script)


def test_every_field_of_the_page_has_a_label(page: ParsedPage) -> None:
    labelled = {attributes.get("for") for tag, attributes in page.elements if tag == "label"}
    for tag, attributes in page.elements:
        if tag in ("textarea", "select") or attributes.get("type") == "password":
            assert attributes["id"] in labelled
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert ("html", {"lang": "en"}) in page.elements


@pytest.mark.parametrize(("keys", "status"), [(None, 404), (Keys([KEY]), 401)])
def test_without_the_page_its_path_is_as_any_other(
    reranker: Reranker, keys: Keys | None, status: int
) -> None:
    with TestClient(create_app(reranker, keys=keys, page=False)) as client:
        assert client.get("/").status_code == client.get("/nowhere").status_code == status


@pytest.mark.parametrize(("flags", "status"), [([], 200), (["--no-page"], 404)])
def test_the_flag_turns_the_page_off(folder: Path, flags: list[str], status: int) -> None:
    with running(folder, *flags) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        assert connection.getresponse().status == status
        connection.close()


def test_the_description_of_the_bundle_names_its_values_per_token(client: TestClient) -> None:
    headers = {"x-api-key": KEY}
    (model,) = client.get("/v1/models", headers=headers).json()["data"]
    assert model["token_scores"] == "token_logratios"
    assert "/" not in client.get("/openapi.json", headers=headers).json()["paths"]
