"""The response cache: exactly the scores that are computed without it, within its memory."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tiny_bundle import other_bundle, tiny_bundle

from logratio.serving import Reranker
from logratio.serving.candidates import Candidate, CandidateGroup
from logratio.serving.reference import with_reference
from logratio.serving.response_cache import ENTRY_BYTES, ResponseCache
from logratio.serving.server import create_app

CANDIDATES = ["sad", "happy loud", "on the mat in the house", "", "under a tree"]
SUMS = (1.5, -2.25, -3.125)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder)


@contextmanager
def serving(rerankers: Any, megabytes: float) -> Iterator[TestClient]:
    with TestClient(create_app(rerankers, response_cache_mb=megabytes)) as client:
        yield client


def scored(client: TestClient, prompt: str, *candidates: str, **other: Any) -> list[Any]:
    request = other | {"groups": [{"prompt": prompt, "candidates": candidates}]}
    answer = client.post("/v1/score", json=request)
    assert answer.status_code == 200, answer.text
    results: list[Any] = answer.json()["groups"][0]["results"]
    return results


def metrics(client: TestClient, bundle: str = "default") -> dict[str, float]:
    """Hits, misses and tokens of runs."""
    names = {
        "logratio_response_cache_hits_total": "hits",
        "logratio_response_cache_misses_total": "misses",
        "logratio_run_tokens_total": "tokens",
    }
    return {
        names[sample.name]: sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name in names and sample.labels["bundle"] == bundle
    }


def group_of(*candidates: tuple[int, ...], prompt: tuple[int, ...] = (1, 2)) -> CandidateGroup:
    return CandidateGroup(prompt, False, tuple(map(Candidate, candidates)))


def test_answers_are_bit_for_bit_those_without_a_cache(reranker: Reranker) -> None:
    with serving(reranker, 0) as plain, serving(reranker, 1) as cached:
        expected = scored(plain, "the cat", *CANDIDATES)
        first = scored(cached, "the cat", *CANDIDATES[:2])
        assert first == expected[:2]
        # New candidates of a known prompt are computed alone, in another run than without a cache.
        assert scored(cached, "the cat", *CANDIDATES) == expected
        assert scored(cached, "the cat", *CANDIDATES) == expected
        assert metrics(cached) | {"tokens": 0} == {"hits": 2 + 4, "misses": 2 + 2, "tokens": 0}
        assert metrics(plain) | {"tokens": 0} == {"hits": 0, "misses": 0, "tokens": 0}


def test_a_new_candidate_of_a_known_prompt_costs_only_itself(reranker: Reranker) -> None:
    with serving(reranker, 1) as client:
        scored(client, "the cat", *CANDIDATES)
        before = metrics(client)["tokens"]
        scored(client, "the cat", *CANDIDATES)
        assert metrics(client)["tokens"] == before
        (new,) = scored(client, "the cat", "loud")
        group = reranker.encode("the cat", ["loud"])
        cost = len(group.prompt_ids) + new["tokens"]
        assert metrics(client)["tokens"] == before + cost
        before = metrics(client)["tokens"]
        scored(client, "the cat", *CANDIDATES, "the mat")
        tokens = scored(client, "the cat", "the mat")[0]["tokens"]
        assert metrics(client)["tokens"] == before + len(group.prompt_ids) + tokens


def test_other_prompts_and_bundles_share_no_scores(
    reranker: Reranker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    both = {"a": reranker, "b": Reranker.load(other_bundle(tmp_path_factory))}
    with serving(both, 0) as plain, serving(both, 1) as cached:
        for prompt in ("the cat", "the mat"):
            for model in both:
                asked = (prompt, *CANDIDATES)
                assert scored(cached, *asked, model=model) == scored(plain, *asked, model=model)
        assert metrics(cached, "a")["hits"] == metrics(cached, "b")["hits"] == 0


def test_given_log_probs_and_the_division_of_ids_are_part_of_the_key() -> None:
    cache, group = ResponseCache(1), group_of((3, 4), (5,))
    cache.add("digest", group, {(3, 4): SUMS, (5,): SUMS})
    assert cache.find("digest", group) == {(3, 4): SUMS, (5,): SUMS}
    assert cache.find("other", group) == {}
    assert cache.find("digest", group_of((4,), (2, 3, 4), prompt=(1, 2, 3))) == {}
    assert cache.find("digest", group_of((2, 3, 4), prompt=(1,))) == {}
    given = with_reference(group, [-1.0, -2.0])
    assert cache.find("digest", given) == {}
    cache.add("digest", given, {(5,): SUMS})
    assert cache.find("digest", given) == {(5,): SUMS}
    assert cache.find("digest", with_reference(group, [-1.0, -2.5])) == {}


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = ResponseCache(3 * ENTRY_BYTES / 2**20)
    for number in range(3):
        cache.add("digest", group_of((number,)), {(number,): SUMS})
    assert cache.find("digest", group_of((0,)))
    cache.add("digest", group_of((3,)), {(3,): SUMS})
    kept = [bool(cache.find("digest", group_of((number,)))) for number in range(4)]
    assert kept == [True, False, True, True]
    assert len(cache) == 3


def test_the_cache_needs_no_more_memory_than_it_may() -> None:
    cache, megabytes = ResponseCache(1), 1
    ids = [(number, number) for number in range(2 * 2**20 // ENTRY_BYTES)]
    group, sums = group_of(*ids), dict.fromkeys(ids, SUMS)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for start in range(0, len(ids), 100):
            part = ids[start : start + 100]
            few = replace(group, candidates=group.candidates[start : start + 100])
            cache.add("digest", few, {one: sums[one] for one in part})
        del part, few
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache) == 2**20 // ENTRY_BYTES
    assert 0.5 < (after - before) / 2**20 <= megabytes


def test_scores_that_are_not_finite_are_not_kept() -> None:
    cache, group = ResponseCache(1), group_of((1,), (2,))
    nothing = float("nan")
    cache.add("digest", group, {(1,): (nothing, -1.0, -1.0), (2,): (0.5, nothing, nothing)})
    assert set(cache.find("digest", group)) == {(2,)}  # a reward model has no log-probs


def test_the_cache_has_hashes_of_a_random_key_and_no_content() -> None:
    first, second, group = ResponseCache(1), ResponseCache(1), group_of((1,))
    for cache in (first, second):
        cache.add("digest", group, {(1,): SUMS})
    entries = [vars(cache)["_entries"] for cache in (first, second)]
    assert [[len(name) for name in one] for one in entries] == [[16], [16]]
    assert entries[0].keys() != entries[1].keys()
