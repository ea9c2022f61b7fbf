"""A bundle as a reward function: in TRL's trainers, and called as verl calls it."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tiny_bundle import copy_bundle, tiny_bundle, with_template
from tiny_models import save_tiny_model, word_tokenizer
from transformers import AutoModelForCausalLM

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


def trained(method: str, folder: Path, prompts: Sequence[Any], reward: Any, template: str) -> Any:
    """Let a trainer of TRL itself make one update of a tiny policy with sampled completions."""
    trl = pytest.importorskip("trl")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template or None
    seen: dict[str, list[Any]] = {}

    def record(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    args = getattr(trl, f"{method}Config")(
        output_dir=str(folder / "run"),
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        logging_steps=1,
        max_completion_length=8,
        max_steps=1,
        num_generations=4,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    policy = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "policy", 7))
    trainer = getattr(trl, f"{method}Trainer")(
        policy,
        [reward, record],
        args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    trainer.train()
    has_moved = any((value != before[name]).any() for name, value in policy.state_dict().items())
    return SimpleNamespace(log=trainer.state.log_history[0], has_moved=has_moved, **seen)


@pytest.mark.filterwarnings("ignore")  # those of TRL are not under test
@pytest.mark.parametrize(("method", "is_chat"), [("GRPO", False), ("GRPO", True), ("RLOO", False)])
def test_trainers_of_trl_learn_from_the_rewards_of_a_bundle(
    method: str, is_chat: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle, template = tiny_bundle(tmp_path_factory) / "bundle", ""
    prompts: list[Any] = ["the cat", "the dog"]
    if is_chat:
        template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        bundle = with_template(copy_bundle(tmp_path_factory, tmp_path / "bundle"), template)
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    reward = RewardFunction(bundle, missing=-9.0)
    found = trained(method, tmp_path, prompts, reward, template)
    assert len(found.completions) == 8
    reranker, expected = Reranker.load(bundle), []
    for prompt, completion in zip(found.prompts, found.completions, strict=True):
        text = completion[0]["content"] if is_chat else completion
        ((score,),) = reranker.score_groups([reranker.encode(prompt, [text])])
        expected.append(score.reward if score.error is None else -9.0)
    assert len(set(expected)) > 2
    assert found.log["rewards/logratio_reward/mean"] == pytest.approx(mean(expected), abs=1e-4)
    assert found.log["rewards/logratio_reward/std"] == pytest.approx(stdev(expected), abs=1e-4)
    assert found.has_moved


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
