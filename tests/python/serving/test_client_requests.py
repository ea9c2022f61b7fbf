"""The requests that clients of other servers send, as captured, and what those clients read.

`make clients` runs the clients themselves. Each parser does what the client does with an
answer, and fails where the client would.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient
from tiny_bundle import tiny_bundle

from logratio.serving import Reranker
from logratio.serving.server import create_app

QUERY = "the cat sits"
DOCUMENTS = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
PLAIN = {"model": "m", "query": QUERY, "documents": DOCUMENTS}
OBJECTS = [{"text": text} for text in DOCUMENTS]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")


@pytest.fixture(scope="module", params=[False, True], ids=["lenient", "strict"])
def client(reranker: Reranker, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    with TestClient(create_app(reranker, strict=request.param)) as client:
        yield client


def cohere(answer: Any) -> list[tuple[int, float]]:
    """`cohere`, LangChain's and LlamaIndex's Cohere and Jina classes: index and score."""
    return [(one["index"], one["relevance_score"]) for one in answer["results"]]


def with_objects(answer: Any) -> list[tuple[int, float]]:
    """`litellm` as `cohere/`, `jina_ai/` and `hosted_vllm/`: documents are objects."""
    assert answer["id"]
    assert answer["usage"]["total_tokens"]
    assert all(one["document"]["text"] == DOCUMENTS[one["index"]] for one in answer["results"])
    return cohere(answer)


def with_strings(answer: Any) -> list[tuple[int, float]]:
    """`litellm` as `infinity/`, and infinity_client: documents are strings."""
    assert answer["object"] == "rerank"
    assert isinstance(answer["created"], int)
    assert answer["usage"]["prompt_tokens"]
    assert all(one["document"] == DOCUMENTS[one["index"]] for one in answer["results"])
    return cohere(answer)


def infinity(answer: Any) -> list[tuple[int, float]]:
    """infinity_client without documents."""
    assert all("document" not in one for one in answer["results"])
    return cohere(answer)


def tei(answer: Any) -> list[tuple[int, float]]:
    """LlamaIndex's TEI class, and `litellm` as `huggingface/`: a bare list."""
    assert isinstance(answer, list)
    return [(one["index"], one["score"]) for one in answer]


HUGGING_FACE = {"raw_scores": False, "truncate": False, "truncation_direction": "Right",
                "query": QUERY, "texts": DOCUMENTS, "return_text": True}  # fmt: skip
REQUESTS: list[tuple[str, str, dict[str, Any], Callable[[Any], list[tuple[int, float]]]]] = [
    ("cohere v1", "/v1/rerank", PLAIN | {"top_n": 2, "return_documents": True}, with_objects),
    ("cohere v2", "/v2/rerank", PLAIN | {"top_n": 2}, cohere),
    ("langchain cohere", "/v2/rerank", PLAIN | {"top_n": 2, "max_tokens_per_doc": None}, cohere),
    ("langchain infinity", "/rerank",
     PLAIN | {"return_documents": False, "raw_scores": False}, infinity),
    ("infinity_client", "/infinity/rerank",
     PLAIN | {"return_documents": True, "raw_scores": True, "top_n": 3}, with_strings),
    ("litellm infinity", "/infinity/rerank", PLAIN | {"return_documents": True}, with_strings),
    ("litellm hosted_vllm", "/rerank", PLAIN | {"return_documents": True}, with_objects),
    ("litellm jina_ai", "/v1/rerank", PLAIN | {"top_n": 2, "return_documents": True}, with_objects),
    ("llama-index jina", "/v1/rerank", PLAIN | {"top_n": 3}, cohere),
    ("litellm huggingface", "/rerank", HUGGING_FACE | {"top_n": 2}, tei),
    ("llama-index tei", "/rerank", {"query": QUERY, "texts": DOCUMENTS}, tei),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "parse"), [one[1:] for one in REQUESTS], ids=[one[0] for one in REQUESTS]
)
def test_a_client_reads_the_scores_in_their_order(
    client: TestClient,
    reranker: Reranker,
    path: str,
    body: dict[str, Any],
    parse: Callable[[Any], list[tuple[int, float]]],
) -> None:
    response = client.post(path, json=body, headers={"authorization": "Bearer any"})
    assert response.status_code == 200
    expected = [(score.index, score.reward) for score in reranker.rank(QUERY, DOCUMENTS)]
    assert parse(response.json()) == expected[: body.get("top_n")]


@pytest.mark.parametrize(
    ("path", "body", "parse", "warning"),
    [
        ("/v1/rerank", PLAIN | {"documents": OBJECTS, "rank_fields": ["text"]}, cohere,
         "rank_fields is ignored: a document is a string, or an object with text"),
        ("/v2/rerank", PLAIN | {"priority": 3}, cohere,
         "priority is ignored: requests have no priority"),
    ],
)  # fmt: skip
def test_a_client_reads_an_answer_to_fields_that_are_ignored(
    reranker: Reranker,
    path: str,
    body: dict[str, Any],
    parse: Callable[[Any], list[tuple[int, float]]],
    warning: str,
) -> None:
    with TestClient(create_app(reranker)) as lenient:
        answer = lenient.post(path, json=body).json()
    expected = [(score.index, score.reward) for score in reranker.rank(QUERY, DOCUMENTS)]
    assert parse(answer) == expected
    assert answer["warnings"] == [warning]
