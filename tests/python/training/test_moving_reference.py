"""A reference that follows the policy: in training, in evaluation and after resuming."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from safetensors.torch import load_file
from stop_after import stop_after
from torch import nn

from logratio.errors import ConfigError
from logratio.training import LoraSettings, RunInterruptedError, TrainConfig, load_model, train
from logratio.training.moving_reference import MovingReference
from logratio.training.validation import check_settings


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    data = write_pairs(tmp_path / "pairs.jsonl", 16)
    return TrainConfig(
        tiny_model, data, tmp_path / "out", batch_size=4, epochs=2, lr=1e-3, report=False,
        sync_reference=True, reference_sync_steps=3, reference_mixup_alpha=0.25, warmup=0.0,
    )  # fmt: skip


def test_the_reference_becomes_the_mixture_every_few_updates() -> None:
    own, policy = nn.Linear(3, 2), nn.Linear(3, 2)
    before = own.weight.detach().clone()
    reference = MovingReference(own, every=2, share=0.25)
    reference.follow(policy, 1)
    assert torch.equal(own.weight, before)
    reference.follow(policy, 2)
    expected = 0.25 * policy.weight + 0.75 * before
    torch.testing.assert_close(own.weight.detach(), expected.detach())


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_reference_that_becomes_the_policy_brings_the_loss_back_to_ln_2(
    config: TrainConfig,
) -> None:
    config = replace(config, reference_mixup_alpha=1.0)
    train(config, show_progress=False)
    losses = [row["loss"] for row in rows(Path(config.output))]
    at_start = [abs(loss - 0.6931472) < 1e-4 for loss in losses]
    assert at_start == [step % 3 == 0 for step in range(8)]


def test_a_resumed_run_ends_with_the_same_weights(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(config, show_progress=False).output
    halved = replace(config, output=tmp_path / "halved")
    with stop_after(5), pytest.raises(RunInterruptedError):
        train(halved, show_progress=False)
    checkpoint = max((tmp_path / "halved" / "checkpoints").glob("checkpoint-*"))
    saved = load_file(checkpoint / "reference.safetensors")
    start = dict(load_model(config.model).named_parameters())
    assert saved.keys() == {f"reference.{name}" for name in start}
    assert any(not torch.equal(saved[f"reference.{name}"], start[name]) for name in start)
    train(replace(halved, resume=True), show_progress=False)
    one, other = (load_file(Path(o) / "model.safetensors") for o in (whole, halved.output))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_held_out_pairs_are_scored_again_once_it_has_moved(config: TrainConfig) -> None:
    config = replace(config, reference_mixup_alpha=1.0, eval_share=0.3, eval_every=3, max_steps=3)
    train(config, show_progress=False)
    (row,) = rows(Path(config.output), "evaluations.jsonl")
    assert row["eval_loss"] == pytest.approx(0.6931472, abs=1e-4)  # after the change of update 3


def test_a_run_that_ends_before_the_first_change_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="changes the reference every 9 updates, and the run has"):
        train(replace(config, reference_sync_steps=9), show_progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache": "cache"}, "cache has log-probs of one that stays"),
        ({"lora": LoraSettings()}, "remove the adapter"),
        ({"loss": "simpo"}, "has no reference"),
        ({"precision": "bf16-weights"}, "round the mixture away"),
        ({"sync_reference": False}, "needs sync_reference"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: TrainConfig, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(replace(config, **changes))
