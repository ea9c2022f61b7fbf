"""Evaluation: ties, margins and calibration by hand, and the KL against its exact value."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from method_groups import write_answers, write_lists
from tiny_models import WORDS

from logratio.data.formats.settings import FormatSettings
from logratio.errors import ConfigError
from logratio.forecast import OutputError
from logratio.intervals import wilson
from logratio.training import EvaluateConfig, TrainConfig, evaluate, load_model, train
from logratio.training.evaluation import drawn_logratios, sample_completions


def test_policy_equal_to_reference(tiny_model: Path, pairs_file: Path) -> None:
    result = evaluate(EvaluateConfig(tiny_model, tiny_model, [pairs_file], beta=0.1, samples=8))
    assert result.pairs == 16
    assert result.accuracy == 0.5  # every pair ties, and a tie counts half
    assert result.accuracy_interval == wilson(0.5, 16)
    assert result.margin == 0.0
    assert result.kl is not None
    assert result.kl.nats == 0.0
    assert repr(result) == "Evaluation(16 pairs, accuracy 0.500, margin 0, beta 0.1)"


def test_a_trained_policy_is_seen_to_prefer(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(
        TrainConfig(tiny_model, [pairs_file], out, lr=3e-3, batch_size=4, epochs=8),
        show_progress=False,
    )
    result = evaluate(EvaluateConfig(out, tiny_model, [pairs_file]))
    assert result.accuracy == 1.0
    assert result.logratio_chosen is not None and result.logratio_rejected is not None
    assert result.sources == {"pairs.jsonl": (16, 1.0)}
    assert result.margin == pytest.approx(
        0.1 * (result.logratio_chosen - result.logratio_rejected), rel=1e-6
    )
    assert result.logratio_chosen > result.logratio_rejected
    assert result.kl is None


def test_the_kl_estimate_covers_the_exact_kl(
    tiny_model: Path, make_model: Callable[..., Path]
) -> None:
    """With one-token completions the KL is a finite sum over the vocabulary."""
    policy, reference = load_model(make_model("other", 3)), load_model(tiny_model)
    prompt = [1, 5, 6, 8]
    with torch.no_grad():
        logps = [
            torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1].double(), -1)
            for model in (policy, reference)
        ]
    exact = float((logps[0].exp() * (logps[0] - logps[1])).sum())
    prompts = [prompt] * 4000
    drawn = sample_completions(policy, prompts, max_new_tokens=1, stop_ids=[2], seed=0)
    ratios = drawn_logratios(policy, reference, prompts, drawn)
    error = ratios.std(ddof=1) / math.sqrt(len(ratios))
    assert abs(ratios.mean() - exact) < 4 * error
    assert exact > 10 * error  # so that the test can fail


def test_sampling_draws_from_the_models_distribution(tiny_model: Path) -> None:
    model, prompt = load_model(tiny_model), [1, 5, 6]
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1).numpy()
    drawn = sample_completions(model, [prompt] * 5000, max_new_tokens=1, stop_ids=[2])
    counts = np.bincount([ids[0] for ids in drawn], minlength=len(expected)) / 5000
    assert np.abs(counts - expected).max() < 0.03


def test_sampling_is_reproducible_and_leaves_the_callers_randomness_alone(
    tiny_model: Path,
) -> None:
    model, prompts = load_model(tiny_model), [[1, 5], [1, 5, 6, 7, 8], [1]]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample_completions(model, prompts, max_new_tokens=7, stop_ids=[2], seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert first == sample_completions(model, prompts, max_new_tokens=7, stop_ids=[2], seed=3)
    assert first != sample_completions(model, prompts, max_new_tokens=7, stop_ids=[2], seed=4)
    assert all(1 <= len(ids) <= 7 for ids in first)
    assert all(2 not in ids[:-1] for ids in first)


def test_generation_settings_of_a_folder_do_not_change_the_samples(tiny_model: Path) -> None:
    model, prompts = load_model(tiny_model), [[1, 5, 6]] * 50
    free = sample_completions(model, prompts, max_new_tokens=5, stop_ids=[2])
    model.generation_config.suppress_tokens = list(range(3, 12))  # type: ignore[union-attr]
    model.generation_config.repetition_penalty = 5.0  # type: ignore[union-attr]
    assert sample_completions(model, prompts, max_new_tokens=5, stop_ids=[2]) == free


def test_samples_that_cannot_fit_are_refused_before_scoring(
    tiny_model: Path, pairs_file: Path
) -> None:
    config = EvaluateConfig(
        tiny_model, tiny_model, [pairs_file], beta=0.1, samples=4, max_new_tokens=600
    )
    with pytest.raises(ConfigError, match="positions"):
        evaluate(config)


def test_samples_of_both_models_are_kept(
    tiny_model: Path, make_model: Callable[..., Path], pairs_file: Path, tmp_path: Path
) -> None:
    """Equal models write the same texts, as both are sampled with one seed."""
    path = tmp_path / "new" / "samples.jsonl"
    settings = EvaluateConfig(
        make_model("other", 1), tiny_model, [pairs_file], beta=0.1, samples=20, max_new_tokens=5
    )
    without = evaluate(settings, show_progress=False)
    kept = evaluate(replace(settings, samples_file=path), show_progress=False)
    assert kept == without, "the file changes no result"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in pairs_file.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [*prompts, *prompts[:4]]
    for side in ("policy", "reference"):
        assert not [row for row in rows if "</s>" in row[side]]
        assert 0 < sum(row[f"{side}_truncated"] for row in rows) < 20
    assert sum(row["policy"] != row["reference"] for row in rows) > 10
    evaluate(replace(settings, policy=tiny_model, samples_file=path), show_progress=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["policy"] == row["reference"] for row in rows)


def test_a_note_names_the_setting_that_keeps_samples(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(
        tiny_model, tiny_model, [pairs_file], beta=0.1, samples=2, max_new_tokens=2
    )
    evaluate(config)
    assert "samples_file writes both" in capsys.readouterr().err
    evaluate(replace(config, samples_file=tmp_path / "samples.jsonl"))
    evaluate(replace(config, samples=0))
    assert "samples_file" not in capsys.readouterr().err


def test_a_file_of_samples_needs_samples_and_a_place(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(tiny_model, tiny_model, [pairs_file], beta=0.1, samples_file="s.jsonl")
    with pytest.raises(ConfigError, match="samples_file needs samples"):
        evaluate(config)
    (tmp_path / "file").touch()
    config = replace(config, samples=2, samples_file=tmp_path / "file" / "s.jsonl")
    with pytest.raises(OutputError):
        evaluate(config)


def test_data_without_pairs_names_what_evaluates_it(tiny_model: Path, tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers.jsonl", 4)
    config = EvaluateConfig(tiny_model, tiny_model, answers, beta=0.1)
    with pytest.raises(ConfigError, match="has labelled answers: give them as eval_data to"):
        evaluate(config, show_progress=False)
    lists = write_lists(tmp_path / "lists.jsonl", 4)
    groups = replace(config, data=lists, formats=FormatSettings(lists="groups"))
    with pytest.raises(ConfigError, match=r"has lists: give .* pairs, which makes all pairs"):
        evaluate(groups, show_progress=False)
    assert evaluate(replace(config, data=lists), show_progress=False).pairs > 4


def test_a_policy_of_a_loss_without_reference_names_what_measures_its_rewards(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "policy"))
    for loss, words in (("simpo", "was trained with simpo, whose own"), ("dpo", "Only a reward")):
        (folder / "training.json").write_text(json.dumps({"loss": loss}))
        with pytest.raises(ConfigError, match=words):
            evaluate(EvaluateConfig(folder, None, pairs_file), show_progress=False)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}the {{ m.content }}</s>{% else %}"
    "on {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}the {% endif %}"
)


@pytest.fixture
def chat_model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "chat-model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_weighted(path: Path, count: int, seed: int) -> Path:
    """Write pairs of chats of two answers, whose first one has a weight, often below 0."""
    random = Random(seed)

    def turn(role: str, **more: float) -> dict[str, Any]:
        words = random.choices(WORDS[5:], k=random.randint(1, 4))
        return {"role": role, "content": " ".join(words), **more}

    def side(weight: float) -> list[dict[str, Any]]:
        return [turn("assistant", weight=weight), turn("user"), turn("assistant")]

    rows = [
        {
            "prompt": [turn("user")],
            "chosen": side([-1, 0.5, -3, 2][n % 4]),
            "rejected": side([1, -2, 4][n % 3]),
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("share_beginnings", [False, True])
def test_weights_of_turns_count_as_in_the_runs_own_evaluation(
    chat_model: Path, tmp_path: Path, share_beginnings: bool
) -> None:
    data, held = (write_weighted(tmp_path / f"{n}.jsonl", 12, n) for n in range(2))
    out = tmp_path / "out"
    config = TrainConfig(chat_model, [data], out, eval_data=[held], lr=3e-3, epochs=2)
    train(config, show_progress=False)
    row = json.loads((out / "evaluations.jsonl").read_text().splitlines()[-1])
    how = EvaluateConfig(out, chat_model, [held], share_beginnings=share_beginnings)
    found = evaluate(how, show_progress=False)
    expected = {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "logratio_chosen": "logratios/chosen",
        "logratio_rejected": "logratios/rejected",
        "length_chosen": "lengths/chosen",
        "length_rejected": "lengths/rejected",
    }
    for name, metric in expected.items():
        assert getattr(found, name) == pytest.approx(row[f"eval_{metric}"], rel=1e-6, abs=1e-6)
    assert found.calibration.expected_error == pytest.approx(
        row["eval_expected_calibration_error"], abs=1e-6
    )
    plain = json.loads(held.read_text().splitlines()[0])
    assert plain["chosen"][0].pop("weight") == -1
    held.write_text(json.dumps(plain) + "\n" + "".join(held.read_text().splitlines(True)[1:]))
    other = evaluate(how, show_progress=False)
    assert abs(other.margin - found.margin) > 1e-3


def test_a_reward_model_refuses_weights_of_turns_before_it_is_loaded(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "plain.jsonl"
    rows = [json.loads(line) for line in write_weighted(data, 6, 0).read_text().splitlines()]
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side][0]["weight"] = 0
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "rm"
    train(TrainConfig(chat_model, [data], out, loss="bradley-terry"), show_progress=False)
    assert evaluate(EvaluateConfig(out, None, [data]), show_progress=False).pairs == 6

    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("logratio.training.evaluation.load_model", load)
    weighted = write_weighted(tmp_path / "weighted.jsonl", 6, 0)
    with pytest.raises(ConfigError, match=r"a reward model scores whole answers.*6 groups have"):
        evaluate(EvaluateConfig(out, None, [weighted]), show_progress=False)
