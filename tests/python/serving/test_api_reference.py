"""The page at `/docs`: every route, field and error of the API, offline and without scripts."""

import ast
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from parsed_page import ParsedPage
from repository import ROOT
from starlette.testclient import TestClient
from tiny_bundle import copy_bundle, with_template

from logratio.serving import Reranker
from logratio.serving.api_reference import reference_page
from logratio.serving.example_answers import SCORE
from logratio.serving.keys import Keys
from logratio.serving.limits import ERRORS
from logratio.serving.server import create_app

KEY = "a-key-of-these-tests"
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
HOSTILE = "</style></pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    folder = copy_bundle(tmp_path_factory, tmp_path_factory.mktemp("chat") / "bundle")
    return Reranker.load(with_template(folder, TEMPLATE))


@pytest.fixture(scope="module")
def client(reranker: Reranker) -> Iterator[TestClient]:
    with TestClient(create_app(reranker, keys=Keys([KEY]))) as client:
        yield client


@pytest.fixture(scope="module")
def document(client: TestClient) -> Any:
    return client.get("/openapi.json", headers={"x-api-key": KEY}).json()


@pytest.fixture(scope="module")
def page(client: TestClient) -> ParsedPage:
    return ParsedPage(client.get("/docs").text)


def test_the_reference_needs_no_key(client: TestClient) -> None:
    response = client.get("/docs")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text.startswith("<!doctype html>")
    assert client.get("/openapi.json").status_code == 401


def test_every_route_is_shown_once_and_in_the_contents(document: Any, page: ParsedPage) -> None:
    routes = [
        f"{method.upper()} {path}" for path, one in document["paths"].items() for method in one
    ]
    assert len(routes) > 20
    shown = [
        line for text in page.texts("summary") for line in re.findall(r"[A-Z]+ /[\w/{}.]*", text)
    ]
    assert Counter(shown) == Counter(routes)
    contents = page.texts("nav")[0].split()
    assert {path for path in contents if path.startswith("/")} == {*document["paths"]}
    groups = [tag["name"] for tag in document["tags"]]
    assert page.texts("h2") == [*groups, "All routes", "Requests", *groups, "Errors", "Objects"]


def test_every_object_has_a_table_of_its_fields(document: Any, page: ParsedPage) -> None:
    for name, schema in document["components"]["schemas"].items():
        (text, *_) = page.texts("div", id=f"object-{name}")
        for field in schema["properties"]:
            assert re.search(rf"\b{field}\b", text), (name, field)
    rows = {tuple(cell.strip() for cell in re.findall("[^\n]+", text)) for text in page.texts("tr")}
    assert ("top_n", "integer ≥ 1 or null", "null", "Return only the best n.") in rows
    assert ("documents", "list of string or Document", "required",
            "The candidates: completions of the prompt.") in rows  # fmt: skip
    assert any(row[:3] == ("truncate", "boolean", "false") for row in rows)
    assert any(row[:3] == ("truncate", "boolean in the query", "false") for row in rows)
    assert any(row[:2] == ("token_scores", "TokenScores or null") for row in rows)
    # RequestInput is no component of the document.
    assert ("inputs", "list of RequestInput", "required", "A tensor of text.") in rows


def test_every_field_has_a_meaning(page: ParsedPage) -> None:
    rows = [re.findall("[^\n]+", text) for text in page.texts("tr")]
    assert len(rows) > 200
    without, columns = set(), 0
    for row in rows:
        columns = len(row) if row[0] in ("Name", "Status") else columns
        if len(row) < columns:
            without.add(row[0])
    assert without == {"object", "owned_by"}  # constants


def test_every_link_leads_to_one_place_of_the_page(page: ParsedPage) -> None:
    ids = Counter(given["id"] for _, given in page.elements if "id" in given)
    assert set(ids.values()) == {1}
    links = [given["href"] or "" for tag, given in page.elements if tag == "a"]
    assert len(links) > 100
    assert {link for link in links if not link.startswith("#")} == {"./"}
    assert {link[1:] for link in links if link.startswith("#")} <= ids.keys()


def commands(page: ParsedPage) -> list[str]:
    return page.texts("pre", **{"class": "command"})


def test_every_command_is_answered(
    client: TestClient,
    reranker: Reranker,
    document: Any,
    page: ParsedPage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = client.get("/v1/models", headers={"x-api-key": KEY}).json()["data"][0]
    monkeypatch.setenv("LOGRATIO_API_KEY", KEY)
    monkeypatch.setenv("NAME", model["id"])
    monkeypatch.setenv("VERSION", model["digest"])
    asked = set()
    for command in commands(page):
        curl, silent, address, *rest = shlex.split(command)
        assert (curl, silent) == ("curl", "-s")
        options = [*zip(rest[::2], rest[1::2], strict=True)]
        headers = dict(
            os.path.expandvars(value).split(": ", 1) for flag, value in options if flag == "-H"
        )
        body = dict(options).get("-d")
        path = os.path.expandvars(address.removeprefix("localhost:8000"))
        method = "GET" if body is None else "POST"
        response = client.request(method, path, content=body and body.encode(), headers=headers)
        assert response.status_code == 200, (command, response.text)
        asked.add((method, path))
    assert len(asked) >= 14


def shape(value: Any) -> Any:
    """The names and types of a value without nulls; of a list, those of its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value)


POSTED = ("/v1/rerank", "/v1/score", "/v1/best_of", "/score", "/get_reward")


def test_example_answers_have_the_fields_of_real_ones(client: TestClient, document: Any) -> None:
    schemas = document["components"]["schemas"]
    headers = {"x-api-key": KEY}
    (model,) = client.get("/v1/models", headers=headers).json()["data"]
    for path in (*POSTED, "/v2/models/{name}/infer"):
        operation = document["paths"][path]["post"]
        asked = operation["requestBody"]["content"]["application/json"]["schema"]
        asked = (asked.get("oneOf") or [asked])[0]
        given = operation["responses"]["200"]["content"]["application/json"]["schema"]
        given = (given.get("anyOf") or [given])[0]
        request, answer = (
            schemas[one["$ref"].rpartition("/")[2]] if "$ref" in one else one
            for one in (asked, given)
        )
        url, body = path.replace("{name}", model["id"]), request["examples"][0]
        real = client.post(url, json=body, headers=headers).json()
        (example,) = answer["examples"]
        assert shape(example) == shape(real), path


def test_rewards_of_the_example_are_beta_times_the_log_ratio() -> None:
    for one in SCORE["groups"][0]["results"]:
        ratio = one["policy_logps"] - one["reference_logps"]
        assert one["reward"] == pytest.approx(SCORE["meta"]["beta"] * ratio)


def test_commands_contain_the_key_as_a_variable_and_only_if_one_is_needed(
    document: Any, page: ParsedPage
) -> None:
    key = '-H "Authorization: Bearer $LOGRATIO_API_KEY"'
    assert all(key in command for command in commands(page))
    open_page = reference_page(document, "", has_keys=False)
    assert "LOGRATIO_API_KEY" not in open_page and "API key:" not in open_page


def test_no_script_may_run_and_nothing_is_loaded(client: TestClient, page: ParsedPage) -> None:
    header = client.get("/docs").headers["content-security-policy"]
    policy = {name: values for name, *values in (part.split() for part in header.split("; "))}
    assert len(policy.pop("style-src")) == len(page.texts("style")) == 2
    assert policy == {
        "default-src": ["'none'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-ancestors": ["'none'"],
        "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }
    for tag, given in page.elements:
        assert tag not in ("script", "img", "iframe", "object", "embed", "form"), tag
        assert not [name for name in given if name.startswith("on") or name in ("style", "src")]
        if tag == "link":
            assert (given["href"] or "").startswith("data:")
    assert not re.search(r"@import|url\(", "".join(page.texts("style")))


def hostile(value: Any) -> Any:
    """The document with other texts wherever it has text for people."""
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if not isinstance(value, dict):
        return value
    texts = ("description", "summary", "default", "enum", "version")
    return {
        key: ([HOSTILE] if key == "enum" else HOSTILE)
        if key in texts and not isinstance(item, dict)
        else [{HOSTILE: HOSTILE}]
        if key == "examples"
        else hostile(item)
        for key, item in value.items()
    }


def test_text_of_the_document_never_becomes_markup(document: Any, page: ParsedPage) -> None:
    changed = hostile(document)
    changed["paths"]["/" + HOSTILE] = changed["paths"]["/v1/models"]
    changed["tags"][0]["name"] = HOSTILE
    schema = changed["components"]["schemas"]["Usage"]
    schema["properties"][HOSTILE] = {"type": HOSTILE}
    found = ParsedPage(reference_page(changed, "", has_keys=True))
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in page.elements} | {"style"}
    known = {name for _, given in page.elements for name in given}
    assert {name for _, given in found.elements for name in given} <= known
    text = "".join(found.texts("body"))
    assert text.count("<script>alert(1)</script>") > 100
    assert "49" not in text
    assert any(shlex.quote(json.dumps({HOSTILE: HOSTILE})) in one for one in commands(found))


def codes_in_the_source() -> set[tuple[int, str]]:
    """Status and code of each `RefusedError` that the server raises."""
    found = set()
    for path in (ROOT / "python/logratio/serving").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RefusedError":
                match node.args:
                    case [ast.Constant(int(status)), ast.Constant(str(code)), *_]:
                        found.add((status, code))
    return found


def test_every_error_code_of_the_server_is_explained(page: ParsedPage) -> None:
    known = {(status, code) for status, codes in ERRORS.items() for code in codes}
    others = {(400, "malformed"), (404, "not_found"), (405, "method")}  # of HTTP itself
    assert known == codes_in_the_source() | others
    for status, codes in ERRORS.items():
        if status != 405:  # no operation has it
            (row,) = page.texts("tr", id=f"error-{status}")
            assert all(
                f"{code}: {meaning.replace('`', '')}" in row for code, meaning in codes.items()
            )


@pytest.mark.parametrize(("keys", "status"), [(None, 404), (Keys([KEY]), 401)])
def test_without_pages_there_is_no_reference(
    reranker: Reranker, keys: Keys | None, status: int
) -> None:
    with TestClient(create_app(reranker, keys=keys, page=False)) as client:
        assert client.get("/docs").status_code == status


def test_both_pages_link_to_each_other(client: TestClient, page: ParsedPage) -> None:
    assert '<a href="docs">' in client.get("/").text
    assert page.texts("a", href="./") == ["Compare candidates"]
