"""The scoring routes: logratio's own, and the requests of other servers, against the reranker."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from tiny_bundle import BETA, copy_bundle, tiny_bundle, with_template

from logratio.serving import Reranker, Score
from logratio.serving.candidates import Reading
from logratio.serving.limits import Limits
from logratio.serving.server import create_app

PROMPT = "the cat sits"
CANDIDATES = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
OTHER = ("the dog", ["runs", "sad sad"])
LONG = "sad " * 600


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")


@pytest.fixture(scope="module")
def client(reranker: Reranker) -> Iterator[TestClient]:
    with TestClient(create_app(reranker)) as client:
        yield client


def group(prompt: object, candidates: list[str]) -> dict[str, object]:
    return {"prompt": prompt, "candidates": candidates}


def posted(client: TestClient, path: str, request: dict[str, Any]) -> Any:
    response = client.post(path, json=request)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(client: TestClient, path: str, request: dict[str, Any]) -> tuple[int, str, str]:
    response = client.post(path, json=request)
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def numbers(result: dict[str, Any]) -> tuple[Any, ...]:
    names = ("index", "reward", "policy_logps", "reference_logps", "tokens")
    return tuple(result[name] for name in names)


def of(score: Score) -> tuple[Any, ...]:
    return score.index, score.reward, score.policy_logps, score.reference_logps, score.tokens


def test_several_prompts_are_scored_as_by_score_many(
    client: TestClient, reranker: Reranker
) -> None:
    groups = [group(PROMPT, CANDIDATES), group(*OTHER), group(PROMPT, ["sad"])]
    answer = posted(client, "/v1/score", {"groups": groups})
    expected = reranker.score_many([(PROMPT, CANDIDATES), OTHER, (PROMPT, ["sad"])])
    for found, scores in zip(answer["groups"], expected, strict=True):
        for result, score in zip(found["results"], scores, strict=True):
            assert numbers(result) == pytest.approx(of(score), rel=1e-6, abs=1e-5)
            assert (result["truncated"], result["error"]) == (False, None)
        assert found["best"] == max(scores, key=lambda score: score.reward).index
        assert (found["prompt_as"], found["prompt_truncated"]) == ("text", False)
    formula = reranker.manifest.graph.reward
    assert answer["meta"] == {"kind": "two_models", "reward": formula, "beta": BETA}
    assert answer["warnings"] == []
    tokens = sum(score.tokens for scores in expected for score in scores)
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["usage"]["prompt_tokens"] == 4 + 3 + 4


def test_a_prompt_or_candidate_that_cannot_be_scored_leaves_the_others(
    client: TestClient, reranker: Reranker
) -> None:
    groups = [group(LONG, ["sad"]), group(PROMPT, ["sad", " ", LONG]), group(PROMPT, [""])]
    first, second, third = posted(client, "/v1/score", {"groups": groups})["groups"]
    assert first["error"]["code"] == "prompt"
    assert first["error"]["message"].startswith("[R304] the prompt has 601 tokens")
    assert (first["best"], first["results"][0]["reward"]) == (None, None)
    assert second["error"] is None
    assert second["results"][0]["reward"] == reranker.score(PROMPT, ["sad"])[0].reward
    faults = [result["error"] for result in second["results"]]
    assert faults == [
        None,
        {"code": "candidate", "message": "[R301] an empty completion"},
        {"code": "candidate", "message": "601 tokens; the prompt leaves 508 of 512"},
    ]
    assert third["best"] is None


def test_truncation_is_chosen_per_request_and_marked(
    client: TestClient, reranker: Reranker
) -> None:
    request = {"groups": [group(PROMPT, ["sad", LONG])], "truncate": True}
    (found,) = posted(client, "/v1/score", request)["groups"]
    assert [result["truncated"] for result in found["results"]] == [False, True]
    assert found["results"][1]["tokens"] == 508
    (plain,) = posted(client, "/v1/score", request | {"truncate": False})["groups"]
    assert plain["results"][1]["reward"] is None


def test_documents_are_truncated_to_the_requested_tokens(
    client: TestClient, reranker: Reranker
) -> None:
    request = {"query": PROMPT, "documents": CANDIDATES, "max_tokens_per_doc": 2}
    results = posted(client, "/v2/rerank", request)["results"]
    ids = [candidate.ids for candidate in reranker.encode(PROMPT, CANDIDATES).candidates]
    assert {r["index"] for r in results if "truncated" in r} == {
        index for index, its in enumerate(ids) if len(its) > 2
    }
    # "on the" without EOS has the ids of the truncated first candidate.
    first = reranker.encode(PROMPT, ["on the"], reading=Reading(verbatim=True))
    assert first.candidates[0].ids == ids[0][:2]
    (score,) = reranker.score_groups([first])[0]
    found = next(result for result in results if result["index"] == 0)
    assert found["relevance_score"] == pytest.approx(score.reward, abs=1e-5)


def test_a_limit_on_tokens_truncates_only_on_request(reranker: Reranker) -> None:
    with TestClient(create_app(reranker, Limits(document_tokens=2))) as client:
        request = {"groups": [group(PROMPT, CANDIDATES)]}
        (found,) = posted(client, "/v1/score", request | {"truncate": True})["groups"]
        assert [result["tokens"] for result in found["results"]] == [2, 2, 2, 2]
        (found,) = posted(client, "/v1/score", request)["groups"]
        assert [bool(result["error"]) for result in found["results"]] == [True, False, True, True]


def test_best_of_is_that_of_the_reranker(client: TestClient, reranker: Reranker) -> None:
    answer = posted(client, "/v1/best_of", group(PROMPT, [*CANDIDATES, " "]))
    best = reranker.best_of(PROMPT, CANDIDATES)
    assert (answer["index"], answer["candidate"]) == (best.index, CANDIDATES[best.index])
    assert answer["reward"] == best.reward
    assert answer["scores"]["best"] == best.index
    assert answer["scores"]["results"][4]["error"]["code"] == "candidate"
    code, name, _ = refusal(client, "/v1/best_of", group(PROMPT, [" "]))
    assert (code, name) == (422, "document")


def test_text_for_a_chat_bundle_is_read_as_in_training_and_the_answer_names_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    bundle = copy_bundle(tmp_path_factory, tmp_path / "bundle")
    loaded = Reranker.load(with_template(bundle, template, text_as="chat"))
    with TestClient(create_app(loaded)) as chats:
        turns = [{"role": "user", "content": "the cat"}]
        groups = [group("the cat", ["sad"]), group(turns, ["sad"])]
        text, chat = posted(chats, "/v1/score", {"groups": groups})["groups"]
    assert (text["prompt_as"], chat["prompt_as"]) == ("chat", "chat")
    assert text["results"] == chat["results"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "groups is missing"),
        ({"groups": "a"}, "groups must be a list"),
        ({"groups": [{"prompt": "a"}]}, "groups.0.candidates is missing"),
        ({"groups": [group(3, ["a"])]}, "groups.0.prompt must be a string or a list of chat"),
        ({"groups": [group([{"role": "user"}], ["a"])]}, "groups.0.prompt.0.content is missing"),
        ({"groups": [group("a", [3])]}, "groups.0.candidates.0 must be a string"),  # type: ignore[list-item]
        ({"groups": [group("a", ["b"])], "top_k": 1}, "unknown field top_k: there are groups, "),
        (
            {"groups": [group("a", ["b"]) | {"row": 1}]},
            "unknown field row: there are prompt, candidates",
        ),
    ],
)
def test_malformed_score_requests_are_refused_by_field(
    reranker: Reranker, wrong: dict[str, Any], words: str
) -> None:
    with TestClient(create_app(reranker, strict=True)) as strict:
        code, name, message = refusal(strict, "/v1/score", wrong)
    assert (code, name) == (422, "malformed")
    assert message.startswith(words)


def test_unknown_fields_of_a_group_are_named(client: TestClient) -> None:
    request = {"groups": [group("the cat", ["sad"]) | {"row": 7}], "temperature": 1}
    warnings = posted(client, "/v1/score", request)["warnings"]
    assert [text.partition(":")[0] for text in warnings] == [
        "unknown field row",
        "unknown field temperature",
    ]


def test_sizes_of_a_request_are_limited(reranker: Reranker) -> None:
    with TestClient(create_app(reranker, Limits(prompts=2, documents=3))) as client:
        groups = [group("the cat", ["sad"])] * 3
        assert refusal(client, "/v1/score", {"groups": groups})[1] == "too_many_prompts"
        assert refusal(client, "/v1/score", {"groups": []})[1] == "no_prompts"
        many = {"groups": [group("the cat", ["sad"] * 4)]}
        assert refusal(client, "/v1/score", many)[1] == "too_many_documents"
        assert refusal(client, "/v1/score", {"groups": [group("a", [])]})[1] == "no_documents"


def test_texts_are_answered_as_by_text_embeddings_inference(
    client: TestClient, reranker: Reranker
) -> None:
    request = {"query": PROMPT, "texts": CANDIDATES, "raw_scores": False, "return_text": True}
    expected = reranker.rank(PROMPT, CANDIDATES)
    for path in ("/rerank", "/v1/rerank"):
        assert posted(client, path, request) == [
            {"index": score.index, "score": score.reward, "text": CANDIDATES[score.index]}
            for score in expected
        ]
    without = posted(client, "/rerank", request | {"return_text": False})
    assert all(set(result) == {"index", "score"} for result in without)
    long = {"query": PROMPT, "texts": ["sad", LONG]}
    code, name, message = refusal(client, "/rerank", long)
    assert (code, name) == (422, "document")
    assert message == "text 1: 601 tokens; the prompt leaves 508 of 512"
    assert len(posted(client, "/rerank", long | {"truncate": True})) == 2
    left = request | {"truncation_direction": "Left"}
    assert refusal(client, "/rerank", left)[1] == "malformed"


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_answered_as_by_vllm(client: TestClient, reranker: Reranker, path: str) -> None:
    scores = [score.reward for score in reranker.score(PROMPT, CANDIDATES)]
    for names in (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")):
        request = dict(zip(names, (PROMPT, CANDIDATES), strict=True)) | {"model": "any"}
        answer = posted(client, path, request)
        assert answer["object"] == "list"
        assert [(one["index"], one["object"]) for one in answer["data"]] == [
            (index, "score") for index in range(4)
        ]
        assert [one["score"] for one in answer["data"]] == scores
    pairs = {"text_1": [PROMPT, "the dog", PROMPT], "text_2": ["sad", "runs", "in the house"]}
    found = [one["score"] for one in posted(client, path, pairs)["data"]]
    dog = reranker.score("the dog", ["runs"])[0].reward
    assert found == pytest.approx([scores[1], dog, scores[3]], abs=1e-5)
    assert len(posted(client, path, {"text_1": "the cat", "text_2": "sad"})["data"]) == 1
    wrong = {"text_1": ["a", "b"], "text_2": ["sad"] * 3}
    assert refusal(client, path, wrong)[1:] == (
        "malformed",
        "text_1 must be one prompt, or as many as text_2 has completions",
    )
    code, name, message = refusal(client, path, {"text_1": "the cat", "text_2": ["sad", ""]})
    assert (code, name, message) == (422, "document", "pair 1: [R301] an empty completion")


def test_rollouts_are_answered_as_by_openrlhf(client: TestClient, reranker: Reranker) -> None:
    tokenizer = reranker.encoder.tokenizer
    eos = tokenizer.files.special_tokens["eos_token"]
    bos = tokenizer.decode(tokenizer.files.opening_ids)
    assert eos
    assert bos
    prompts = [PROMPT, "the dog", PROMPT]
    completions = [" on the mat", " runs", " sad"]
    queries = [
        f"{bos}{prompt}{text}{eos}" for prompt, text in zip(prompts, completions, strict=True)
    ]
    request = {"query": queries, "prompts": prompts, "labels": ["", "", ""]}
    answer = posted(client, "/get_reward", request)
    # The text with EOS spelled out has the ids of the text to which EOS is appended.
    expected = [
        reranker.score(prompt, [text])[0] for prompt, text in zip(prompts, completions, strict=True)
    ]
    rewards = [score.reward for score in expected]
    assert answer["rewards"] == pytest.approx(rewards, abs=1e-5)
    assert answer["scores"] == answer["rewards"]
    assert answer["extra_logs"] == {"scored_tokens": [score.tokens for score in expected]}
    cut = posted(client, "/get_reward", {"query": [f"{PROMPT} sad"], "prompts": [PROMPT]})
    assert cut["extra_logs"] == {"scored_tokens": [1.0]}  # no EOS: generation was cut short


def test_rollouts_that_cannot_be_divided_are_refused(client: TestClient) -> None:
    request = {"query": ["the cat sits", "a dog"], "prompts": ["the cat", "the dog"]}
    code, name, message = refusal(client, "/get_reward", request)
    assert (code, name) == (422, "malformed")
    assert message.startswith("query.1 does not begin with prompts.1")
    code, _, message = refusal(client, "/get_reward", {"query": ["a"], "prompts": []})
    assert (code, message) == (422, "query and prompts must have the same length")
    code, _, message = refusal(client, "/get_reward", {"query": ["a"]})
    assert (code, message) == (422, "prompts is missing")
    long = {"query": [f"{PROMPT} {LONG}"], "prompts": [PROMPT]}
    assert refusal(client, "/get_reward", long)[1] == "document"
    assert posted(client, "/get_reward?truncate=true", long)["extra_logs"] == {
        "scored_tokens": [508.0]
    }


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_an_activation_is_computed_only_on_request(
    client: TestClient, reranker: Reranker, activation: str
) -> None:
    request = {"query": PROMPT, "documents": CANDIDATES, "activation": activation, "top_n": 2}
    results = posted(client, "/v1/rerank", request)["results"]
    rewards = np.array([score.reward for score in reranker.rank(PROMPT, CANDIDATES)])
    weights = np.exp(rewards)
    expected = weights / (weights.sum() if activation == "softmax" else 1 + weights)
    found = [result["relevance_score"] for result in results]
    assert found == pytest.approx(expected[:2].tolist(), rel=1e-12)


def test_the_server_describes_its_bundle(client: TestClient, reranker: Reranker) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["kind"]) == (reranker.manifest.name, "two_models")
    assert (model["digest"], model["beta"]) == (reranker.digest, BETA)
    assert model["max_model_len"] == 512
    versions = client.get("/version").json()
    assert versions["provider"] == reranker.provider
    assert set(versions) == {"version", "onnxruntime", "provider"}
    assert client.get("/health").status_code == 200


def test_the_examples_of_the_schema_are_accepted(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    routes = {
        "RerankRequest": "/v1/rerank",
        "TeiRequest": "/rerank",
        "PairsRequest": "/score",
        "ScoreRequest": "/v1/score",
        "BestOfRequest": "/v1/best_of",
        "OpenRlhfRequest": "/get_reward",
    }
    assert {name for name, its in schemas.items() if "examples" in its} >= routes.keys()
    for name, path in routes.items():
        for example in schemas[name]["examples"]:
            response = client.post(path, json=example)
            # This bundle has no chat template, so it cannot read the examples with chat messages.
            assert response.status_code == 200 or "E401" in response.text, (name, response.text)


def test_scores_that_a_bundle_does_not_have_are_null(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Reranker.compute

    def without_logps(self: Reranker, *given: Any) -> list[tuple[float, float, float]]:
        return [(reward, math.nan, math.nan) for reward, _, _ in compute(self, *given)]

    monkeypatch.setattr(Reranker, "compute", without_logps)
    with TestClient(create_app(reranker)) as client:
        (found,) = posted(client, "/v1/score", {"groups": [group(PROMPT, ["sad"])]})["groups"]
    (result,) = found["results"]
    assert (result["policy_logps"], result["reference_logps"]) == (None, None)
    assert isinstance(result["reward"], float)
