"""The reranker gives torch's rewards, without torch."""

import math
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing_session import failing
from tiny_bundle import (
    BETA,
    copy_bundle,
    plain_sums,
    tiny_bundle,
    with_rules,
    with_template,
)

from logratio.data import InvalidRecordError, PreferenceTokenizer, TokenizationRules
from logratio.extras import MissingExtraError
from logratio.serving import GraphRunError, Reranker, RewardFunction, Score
from logratio.serving.candidates import Candidate, CandidateGroup
from logratio.serving.runs import plan_runs
from logratio.serving.scores import ranked
from logratio.serving.session import ProviderError
from logratio.training import load_model

PROMPT = "the cat sits"
TEXTS = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder / "bundle")


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny bundle that a test may change."""
    return copy_bundle(tmp_path_factory, tmp_path / "bundle")


class RecordingSession:
    """A session that records whether the runs return their memory."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.shrinks: list[bool] = []

    def run(self, names: Any, feed: Any, options: Any) -> Any:
        try:
            entry = options.get_run_config_entry("memory.enable_memory_arena_shrinkage")
        except RuntimeError:  # there is no such entry
            entry = ""
        self.shrinks.append(entry == "cpu:0")
        return self.session.run(names, feed, options)


def test_only_large_runs_return_their_memory(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = RecordingSession(reranker._session)
    monkeypatch.setattr(reranker, "_session", session)
    group = reranker.encode(PROMPT, TEXTS)
    (run,) = reranker.runs([group])
    lengths = [len(candidate.ids) for candidate in group.candidates]
    prompt = len(group.prompt_ids)
    assert run.positions == prompt + len(lengths) * (prompt + max(lengths))
    found = []
    for kept in (run.positions, run.positions - 1):
        monkeypatch.setattr("logratio.serving.reranker.KEPT_POSITIONS", kept)
        found += [reranker.score(PROMPT, TEXTS)]
        reranker.token_scores(PROMPT, TEXTS)
    assert found[0] == found[1]
    assert session.shrinks == [False, False, True, True]


def test_scores_are_torchs_rewards_of_the_training_tokens(folder: Path, reranker: Reranker) -> None:
    tokenizer = PreferenceTokenizer.load(folder / "policy", TokenizationRules())
    prompt = tokenizer.encode_prompt(PROMPT)
    ids = [tokenizer.encode_completion(PROMPT, text) for text in TEXTS]
    policy, reference = (
        plain_sums(load_model(folder / name), prompt, ids) for name in ("policy", "reference")
    )
    scores = reranker.score(PROMPT, TEXTS)
    assert [score.index for score in scores] == [0, 1, 2, 3]
    assert [score.tokens for score in scores] == [len(row) for row in ids]
    for name, expected in (
        ("policy_logps", policy),
        ("reference_logps", reference),
        ("reward", BETA * (policy - reference)),
    ):
        found = [getattr(score, name) for score in scores]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    order = [score.index for score in reranker.rank(PROMPT, TEXTS)]
    assert order == np.argsort(-(policy - reference)).tolist()
    assert reranker.best_of(PROMPT, TEXTS).index == order[0]


def test_equal_candidates_get_equal_scores_and_keep_their_order(reranker: Reranker) -> None:
    texts = ["sad", "happy", "sad", "happy", "happy"]
    scores = reranker.score(PROMPT, texts)
    assert scores[0].reward == scores[2].reward
    assert scores[1].reward == scores[3].reward == scores[4].reward
    order = [score.index for score in reranker.rank(PROMPT, texts)]
    assert order in ([0, 2, 1, 3, 4], [1, 3, 4, 0, 2])


def test_an_invalid_candidate_does_not_affect_the_others(reranker: Reranker) -> None:
    texts = ["sad", "", " \n", "sad " * 600, "half \ud800 a character", "happy"]
    scores = reranker.score(PROMPT, texts)
    assert [score.error is None for score in scores] == [True, False, False, False, False, True]
    assert "R301" in str(scores[1].error) and "R301" in str(scores[2].error)
    assert scores[3].error == "601 tokens; the prompt leaves 508 of 512"
    assert "surrogate" in str(scores[4].error)
    assert all(math.isnan(score.reward) for score in scores if score.error)
    alone = reranker.score(PROMPT, ["sad", "happy"])
    assert [scores[0].reward, scores[5].reward] == [score.reward for score in alone]
    assert [score.index for score in reranker.rank(PROMPT, texts)][2:] == [1, 2, 3, 4]


def test_repr_has_name_beta_and_provider(reranker: Reranker) -> None:
    name = reranker.manifest.name
    assert repr(reranker) == f"Reranker({name!r}, β={BETA:g}, CPUExecutionProvider)"


def test_best_of_nothing_is_an_error(reranker: Reranker) -> None:
    assert reranker.score(PROMPT, []) == []
    with pytest.raises(ValueError, match="no candidate can be scored"):
        reranker.best_of(PROMPT, [])
    with pytest.raises(ValueError, match="R301"):
        reranker.best_of(PROMPT, [""])


def test_completions_are_truncated_only_on_request(bundle: Path) -> None:
    with_rules(bundle, max_length=10)
    long = "happy sad loud happy sad loud happy"
    assert (
        Reranker.load(bundle).score(PROMPT, [long])[0].error
        == "8 tokens; the prompt leaves 6 of 10"
    )
    cut = Reranker.load(bundle, truncate_completions=True).score(PROMPT, [long, "sad"])
    assert [(score.tokens, score.truncated, score.error) for score in cut] == [
        (6, True, None),
        (2, False, None),
    ]


def test_long_prompt_follows_the_bundles_rules(bundle: Path) -> None:
    long = "the cat sits on the mat under a tree"
    for truncation, code in (("drop", "R304"), ("error", "E304")):
        with_rules(bundle, max_prompt_length=5, prompt_truncation=truncation)
        with pytest.raises(InvalidRecordError) as caught:
            Reranker.load(bundle).score(long, ["sad"])
        assert caught.value.code == code
    for truncation, kept in (("keep_start", "the cat sits on"), ("keep_end", "mat under a tree")):
        with_rules(bundle, max_prompt_length=5, prompt_truncation=truncation)
        reranker = Reranker.load(bundle)
        score, whole = reranker.score(long, ["sad"])[0], reranker.score(kept, ["sad"])[0]
        assert score.truncated and not whole.truncated
        assert score.reward == whole.reward


def test_prompt_without_an_encoding_is_refused(reranker: Reranker) -> None:
    with pytest.raises(InvalidRecordError, match="E104"):
        reranker.score("\udfff", ["sad"])


def test_chats_go_through_the_bundles_template(bundle: Path) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    with pytest.raises(InvalidRecordError, match="E401"):
        Reranker.load(bundle).score(messages, ["sad"])
    reranker = Reranker.load(with_template(bundle, CHAT))
    score = reranker.score(messages, ["sad"])[0]
    tokenizer = PreferenceTokenizer.load(bundle, TokenizationRules())
    assert list(reranker.encode(messages, ["sad"]).prompt_ids) == tokenizer.encode_prompt(
        tuple(messages)
    )
    assert score.error is None
    with pytest.raises(InvalidRecordError, match="E403"):
        reranker.score([{"role": "assistant", "content": "hi"}], ["sad"])


def test_many_prompts_share_runs_and_keep_their_scores(reranker: Reranker) -> None:
    requests = [
        ("the dog", ["runs", "sings on the mat"]),
        ("a", ["sad"]),
        ("the bird sings in a tree under the house", ["happy", "", "loud loud", "happy"]),
        ("the dog", []),
    ]
    together = reranker.score_many(requests)
    for (prompt, texts), scores in zip(requests, together, strict=True):
        alone = reranker.score(prompt, texts)
        assert [score.index for score in scores] == list(range(len(texts)))
        for one, other in zip(scores, alone, strict=True):
            assert one.error == other.error
            if one.error is None:
                assert one.reward == pytest.approx(other.reward, abs=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_token_budget_bounds_runs_and_changes_no_score(folder: Path, budget: int) -> None:
    reranker = Reranker.load(folder / "bundle", token_budget=budget)
    prompts = ["the cat", "a bird sings on the mat", "the dog runs"]
    requests = [(prompt, [*TEXTS, f"happy {prompt}"]) for prompt in prompts]
    whole = Reranker.load(folder / "bundle").score_many(requests)
    for scores, others in zip(reranker.score_many(requests), whole, strict=True):
        for one, other in zip(scores, others, strict=True):
            assert one.reward == pytest.approx(other.reward, abs=1e-5)


def test_runs_contain_every_candidate_once_within_the_budget() -> None:
    random = np.random.default_rng(0)

    def group(prompt: int, count: int) -> CandidateGroup:
        lengths = random.integers(1, 30, count)
        candidates = tuple(Candidate(tuple(random.integers(0, 99, n).tolist())) for n in lengths)
        return CandidateGroup(tuple(range(prompt)), False, candidates)

    groups = [group(int(random.integers(1, 60)), int(random.integers(0, 40))) for _ in range(30)]
    seen: list[set[tuple[int, ...]]] = [set() for _ in groups]
    runs = list(plan_runs(groups, 2000))
    for run in runs:
        prompts = [len(groups[number].prompt_ids) for number, _ in run.pieces]
        lengths = [len(ids) for _, candidates in run.pieces for ids in candidates]
        assert run.tokens == len(prompts) * max(prompts) + len(lengths) * max(lengths)
        assert run.real_tokens == sum(prompts) + sum(lengths)
        assert run.tokens + len(lengths) * max(prompts) <= 2000
        for number, candidates in run.pieces:
            assert not seen[number] & set(candidates)
            seen[number] |= set(candidates)
    assert seen == [set(group.different()) for group in groups]
    assert len(runs) < sum(bool(group.candidates) for group in groups)


def test_a_prompt_that_a_padded_graph_repeats_is_no_padding() -> None:
    candidates = tuple(Candidate(tuple(range(n))) for n in (2, 5))
    groups = [CandidateGroup(tuple(range(7)), False, candidates)]
    (shared,), (padded,) = (
        plan_runs(groups, 1000, repeats_prompts=repeats) for repeats in (False, True)
    )
    assert (shared.tokens, shared.real_tokens) == (7 + 2 * 5, 7 + 2 + 5)
    assert (padded.tokens, padded.real_tokens) == (2 * (7 + 5), 2 * 7 + 2 + 5)


@pytest.mark.parametrize("limit", [0, 25, 60, None])
def test_runs_with_several_prompts_have_few_tokens(limit: int | None) -> None:
    def group(prompt: int, *lengths: int) -> CandidateGroup:
        candidates = (Candidate(tuple(range(n))) for n in lengths)
        return CandidateGroup(tuple(range(prompt)), False, tuple(candidates))

    groups = [group(10, 2, 3), group(10, 4), group(9, 30, 31, 32), group(8, 5), group(1, 1)]
    runs = list(plan_runs(groups, 10_000, shared_tokens=limit))
    found = [[number for number, _ in run.pieces] for run in runs]
    assert (
        found
        == {
            0: [[0], [1], [2], [3], [4]],
            25: [[0], [1], [2], [3, 4]],
            60: [[0, 1], [2], [3, 4]],
            None: [[0, 1, 2, 3, 4]],
        }[limit]
    )


def test_order_puts_errors_last_and_ties_by_index() -> None:
    scores = [
        Score(0, math.nan, math.nan, math.nan, 0, error="empty"),
        Score(1, -1.0, 0.0, 0.0, 1),
        Score(2, 2.0, 0.0, 0.0, 1),
        Score(3, 2.0, 0.0, 0.0, 1),
    ]
    assert [score.index for score in ranked(scores)] == [2, 3, 1, 0]


def test_reranking_loads_neither_torch_nor_transformers(folder: Path, tmp_path: Path) -> None:
    code = f"""
import sys
absent = ["torch", "transformers", "peft", "onnx", "onnxscript", "fastapi", "uvicorn"]
sys.modules.update(dict.fromkeys(absent))
from logratio.serving import Reranker
print(Reranker.load({str(folder / "bundle")!r}).best_of("the cat", ["sits", "sad"]).index)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() in "01"


def test_missing_runtime_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"logratio\[rank\].*logratio\[rank-cpu\]"):
        Reranker.load(folder / "bundle")


@pytest.mark.parametrize("wanted", ["CUDAExecutionProvider", "NoSuchExecutionProvider"])
def test_an_unavailable_provider_is_an_error(folder: Path, wanted: str) -> None:
    import onnxruntime

    if wanted in onnxruntime.get_available_providers():
        pytest.skip(f"{wanted} is installed here")
    with pytest.raises(ProviderError, match=f"{wanted} cannot be used"):
        Reranker.load(folder / "bundle", providers=[wanted])
    reranker = Reranker.load(folder / "bundle", providers=[wanted], allow_fallback=True)
    assert reranker.provider == "CPUExecutionProvider"


def test_two_runtimes_in_one_environment_cause_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.distribution

    def both(name: str) -> metadata.Distribution:
        return real("numpy" if name.startswith("onnxruntime") else name)

    monkeypatch.setattr(metadata, "distribution", both)
    with pytest.warns(RuntimeWarning, match="onnxruntime and onnxruntime-gpu are both installed"):
        Reranker.load(folder / "bundle")


def test_a_failed_run_of_the_graph_is_an_error_with_its_reason(reranker: Reranker) -> None:
    broken, _ = failing(reranker)
    long = ["sad", "sits " * 300]
    reason = "the graph failed: RuntimeException: Failed to allocate memory$"
    for call in (broken.rank, broken.token_scores):
        with pytest.raises(GraphRunError, match=reason):
            call(PROMPT, long)
    with pytest.raises(GraphRunError, match=reason):  # not the reward of a bad completion
        RewardFunction(broken, missing=-10.0)(prompts=[PROMPT], completions=long[1:])
    assert broken.score(PROMPT, ["sad"]) == reranker.score(PROMPT, ["sad"])
