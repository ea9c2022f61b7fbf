"""A bundle as a reward function: the calls of TRL and verl, against the reranker."""

import inspect
from pathlib import Path

import pytest
from tiny_bundle import copy_bundle, tiny_bundle, with_template

from logratio.errors import ConfigError
from logratio.serving import NoCandidateError, Reranker, RewardFunction
from logratio.serving.candidates import Reading

PROMPTS = ["the cat sits", "the dog", "the cat sits"]
COMPLETIONS = ["on the mat happy", "runs", "sad"]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    return Reranker.load(tiny_bundle(tmp_path_factory) / "bundle")


@pytest.fixture(scope="module")
def expected(reranker: Reranker) -> list[float]:
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    return [reranker.score(prompt, [text])[0].reward for prompt, text in pairs]


def test_trl_gets_one_reward_per_completion(reranker: Reranker, expected: list[float]) -> None:
    reward = RewardFunction(reranker)
    found = reward(
        prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 3, trainer_state=None
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert reward.__name__ == "logratio_reward"
    assert not inspect.iscoroutinefunction(reward)


def test_verl_gets_the_prompt_from_extra_info(reranker: Reranker, expected: list[float]) -> None:
    reward = RewardFunction(reranker, prompt_key="question")
    infos = [{"question": prompt, "index": 0} for prompt in PROMPTS]
    one = reward.compute_score(
        data_source="any", solution_str=COMPLETIONS[1], ground_truth="", extra_info=infos[1]
    )
    assert one == pytest.approx(expected[1], abs=1e-5)
    many = reward.compute_scores(
        data_sources=["any"] * 3,
        solution_strs=COMPLETIONS,
        ground_truths=[""] * 3,
        extra_infos=infos,
    )
    assert many == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match=r"extra_info has no 'question'.*prompt_key"):
        reward.compute_score("any", "sad", "", {"prompt": "the cat"})


def test_chats_are_read_with_the_bundles_template(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    bundle = with_template(copy_bundle(tmp_path_factory, tmp_path / "bundle"), template)
    reward = RewardFunction(bundle)
    chat = [{"role": "user", "content": "the cat"}]
    answer = [{"role": "assistant", "content": "sad"}]
    assert reward([chat], [answer]) == [Reranker.load(bundle).score(chat, ["sad"])[0].reward]
    with pytest.raises(NoCandidateError, match="one assistant message"):
        reward([chat], [answer * 2])


def test_an_empty_completion_gets_the_chosen_reward_or_is_refused(reranker: Reranker) -> None:
    prompts, completions = ["the cat"] * 2, ["sad", ""]
    scored = reranker.score("the cat", ["sad"])[0].reward
    assert RewardFunction(reranker, missing=-7.0)(prompts, completions) == [scored, -7.0]
    with pytest.raises(NoCandidateError, match=r"completion 1 has no reward: \[R301\].*missing="):
        RewardFunction(reranker)(prompts, completions)


def test_a_long_completion_is_truncated_unless_that_is_refused(reranker: Reranker) -> None:
    (long,) = RewardFunction(reranker)(["the cat"], ["sad " * 600])
    group = reranker.encode("the cat", ["sad " * 600], reading=Reading(truncate=True))
    assert group.candidates[0].truncated
    assert long == reranker.score_groups([group])[0][0].reward
    with pytest.raises(NoCandidateError, match="completion 1 has no reward: 601 tokens"):
        RewardFunction(reranker, truncate=False)(["the cat"] * 2, ["sad", "sad " * 600])
