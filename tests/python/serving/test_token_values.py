"""Values per token over HTTP: against float64, with the text of each token, and equal rewards."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers_for_tests as made
import torch
from byte_bundle import BETA, byte_bundle
from hypothesis import given
from hypothesis import strategies as st
from oracle import in_float64, per_token_logps
from starlette.testclient import TestClient

from logratio.data import PreferenceTokenizer, TokenizationRules
from logratio.serving import Reranker
from logratio.serving.limits import Limits
from logratio.serving.server import create_app
from logratio.serving.service import Scoring
from logratio.serving.token_texts import TokenTexts
from logratio.training import load_model

PROMPT = "how are you"
TEXTS = [
    " today? I am fine",
    " 🙂🙃 日本語, naïve\n\n  \t",
    " e\u0301 \u200f\u05d0\u05d1 \ufffd\ufffda\ufffd🙂",
    " \U0001f468\u200d\U0001f469\u200d\U0001f467",
    " today? I am fine",
]
Body = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder / "bundle")


@pytest.fixture(scope="module")
def client(reranker: Reranker) -> Iterator[TestClient]:
    with TestClient(create_app(reranker)) as client:
        yield client


def scored(client: TestClient, *groups: tuple[str, list[str]], **fields: object) -> list[Body]:
    asked = [{"prompt": prompt, "candidates": texts} for prompt, texts in groups]
    response = client.post("/v1/score", json={"groups": asked, **fields})
    assert response.status_code == 200, response.text
    found: list[Body] = response.json()["groups"]
    return found


def results(client: TestClient, *texts: str, **fields: object) -> list[Body]:
    (group,) = scored(client, (PROMPT, list(texts)), return_tokens=True, **fields)
    found: list[Body] = group["results"]
    return found


def test_log_ratios_are_those_of_torch_in_float64_and_add_up_to_the_reward(
    client: TestClient, folder: Path
) -> None:
    tokenizer = PreferenceTokenizer.load(folder / "policy", TokenizationRules())
    group = tokenizer.encode_completions(PROMPT, TEXTS)
    ids = [completion.ids for completion in group.completions]
    policy, reference = (
        per_token_logps(in_float64(load_model(folder / name)), [(group.prompt_ids, ids)])
        for name in ("policy", "reference")
    )
    expected = torch.split(policy - reference, [len(one) for one in ids])
    for result, its, ratios in zip(results(client, *TEXTS), ids, expected, strict=True):
        tokens = result["token_scores"]
        assert tokens["token_ids"] == its
        assert tokens["token_logps"] is None
        np.testing.assert_allclose(tokens["token_logratios"], ratios.detach(), atol=1e-4)
        assert BETA * sum(tokens["token_logratios"]) == pytest.approx(result["reward"], abs=1e-4)


def test_the_texts_of_tokens_are_those_that_the_tokenizer_encoded(
    client: TestClient, reranker: Reranker
) -> None:
    library = reranker.encoder.tokenizer.files.tokenizer
    for text, result in zip(TEXTS, results(client, *TEXTS), strict=True):
        tokens = result["token_scores"]
        assert "".join(tokens["tokens"]) == f"{text}</s>"
        assert tokens["tokens"][-1] == "</s>"
        encoding = library.encode(text, add_special_tokens=False)
        assert tokens["token_ids"][:-1] == encoding.ids
        if "\ufffd" in text:  # as bytes, an unfinished character looks the same
            continue
        last = {span: number for number, span in enumerate(encoding.offsets)}
        shown = tokens["tokens"][:-1]
        for number, (start, end) in enumerate(encoding.offsets):
            whole = last[start, end] == number
            assert shown[number] == (text[start:end] if whole else "")


def test_rewards_are_bitwise_the_same_with_and_without_tokens(client: TestClient) -> None:
    groups = [(PROMPT, TEXTS), ("yes no", [" maybe", "", " never"]), ("good", [" bad" * 600])]
    plain = scored(client, *groups)
    asked = scored(client, *groups, return_tokens=True)
    assert all(one["token_scores"] is None for group in plain for one in group["results"])
    for group in asked:
        for result in group["results"]:
            has_tokens = result.pop("token_scores") is not None
            assert has_tokens == (result["error"] is None)
    for group in plain:
        for result in group["results"]:
            del result["token_scores"]
    assert asked == plain


def test_values_do_not_depend_on_the_other_candidates(client: TestClient) -> None:
    together = results(client, *TEXTS)
    assert together[0]["token_scores"] == together[4]["token_scores"]
    for text, result in zip(TEXTS, together, strict=True):
        assert results(client, text)[0]["token_scores"] == result["token_scores"]


def test_long_requests_have_the_values_of_every_run(folder: Path) -> None:
    reranker = Reranker.load(folder / "bundle")
    texts = [f" good {number} bad" * (1 + number % 7) for number in range(40)]
    with TestClient(create_app(reranker, Limits(run_tokens=64))) as client:
        found = results(client, *texts)
    for result, values in zip(found, reranker.token_scores(PROMPT, texts), strict=True):
        assert values is not None
        np.testing.assert_allclose(result["token_scores"]["token_logratios"], values, atol=1e-5)


def test_a_candidate_truncated_inside_a_character_ends_with_its_beginning(
    client: TestClient, folder: Path
) -> None:
    text = " 🙂" * 300
    (result,) = results(client, text, truncate=True)
    tokens = result["token_scores"]
    shown = "".join(tokens["tokens"])
    assert result["truncated"]
    assert len(tokens["tokens"]) == len(tokens["token_logratios"]) == result["tokens"]
    assert text.startswith(shown.removesuffix("\ufffd")) and len(shown) > 100


def test_a_policy_alone_has_the_log_prob_of_each_token(folder: Path) -> None:
    with TestClient(create_app(Reranker.load(folder / "free"))) as client:
        for result in results(client, *TEXTS):
            tokens = result["token_scores"]
            assert tokens["token_logratios"] is None
            assert sum(tokens["token_logps"]) == pytest.approx(result["policy_logps"], abs=1e-3)
            mean = BETA * sum(tokens["token_logps"]) / result["tokens"]
            assert mean == pytest.approx(result["reward"], abs=1e-4)


def test_the_best_candidate_comes_with_the_tokens_of_all(client: TestClient) -> None:
    request = {"prompt": PROMPT, "candidates": [*TEXTS, ""], "return_tokens": True}
    answer = client.post("/v1/best_of", json=request).json()
    *found, last = [one["token_scores"] for one in answer["scores"]["results"]]
    assert found == [one["token_scores"] for one in results(client, *TEXTS)]
    assert last is None


def test_a_bundle_without_values_per_token_refuses_them_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = Reranker.load(folder / "bundle")
    graph = replace(reranker.manifest.graph, per_token=False)
    reranker.manifest = replace(reranker.manifest, graph=graph)
    with TestClient(create_app(reranker)) as client:
        monkeypatch.setattr(Reranker, "encode", None)
        request = {"prompt": PROMPT, "candidates": TEXTS, "return_tokens": True}
        response = client.post("/v1/best_of", json=request)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "no_token_values"


def test_a_request_that_is_too_large_is_not_decoded(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scoring, "decode", None)
    request = {"prompt": PROMPT, "candidates": TEXTS, "return_tokens": True}
    with TestClient(create_app(reranker, Limits(request_tokens=50))) as client:
        response = client.post("/v1/best_of", json=request)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_many_tokens")


MADE = ("byte_level", "whole_text", "unigram", "word_level", "word_piece")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreferenceTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        name: PreferenceTokenizer.load(made.save(folder / name, getattr(made, name)()))
        for name in MADE
    }


@given(
    name=st.sampled_from(MADE),
    text=st.text(st.characters(codec="utf-8") | st.sampled_from("ae \n\ufffd🙂é日"), min_size=1),
    cut=st.integers(1, 20),
)
def test_joined_texts_are_the_decoded_text(
    tokenizers: dict[str, PreferenceTokenizer], name: str, text: str, cut: int
) -> None:
    tokenizer = tokenizers[name]
    library = tokenizer.files.tokenizer
    for ids in (library.encode(text).ids, library.encode(text).ids[:cut]):
        texts = TokenTexts(tokenizer).of(ids)
        before = tokenizer.decode([tokenizer.pad_id])
        assert len(texts) == len(ids)
        assert before + "".join(texts) == tokenizer.decode([tokenizer.pad_id, *ids])
    if name == "byte_level":
        assert "".join(TokenTexts(tokenizer).of(library.encode(text).ids)) == text
