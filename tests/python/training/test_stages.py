"""Stage-wise training: every stage starts from the one before, which is its reference."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from safetensors.torch import load_file
from stop_after import stop_after

from logratio.errors import ConfigError
from logratio.training import LoraSettings, RunInterruptedError, TrainConfig, train
from logratio.training.stages import stages_of, train_stages


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> TrainConfig:
    data = [write_pairs(tmp_path / f"{number}.jsonl", 6 + number) for number in range(3)]
    return TrainConfig(
        tiny_model, data, tmp_path / "out", batch_size=4, lr=1e-3, report=False, warmup=0.0
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(Path(folder).glob("*model.safetensors")))


def test_stages_are_runs_that_follow_each_other(config: TrainConfig, tmp_path: Path) -> None:
    cached = replace(config, cache=tmp_path / "cache", precompute=True)
    result = train_stages(cached, show_progress=False)
    model: Any = config.model
    for number, data in enumerate(config.data):
        own = replace(config, model=model, data=[data], output=tmp_path / f"own-{number}")
        model = train(own, show_progress=False).output
    assert result.output == config.output
    ours, expected = weights(Path(config.output)), weights(model)
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)
    rows = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["loss"] == pytest.approx(0.6931472, abs=1e-4)
    assert len([*(tmp_path / "cache").iterdir()]) == 3


def test_finished_stages_are_kept_by_resume(config: TrainConfig, tmp_path: Path) -> None:
    whole = train_stages(replace(config, output=tmp_path / "whole"), show_progress=False).output
    with stop_after(1), pytest.raises(RunInterruptedError):
        train_stages(config, show_progress=False)
    assert not (Path(config.output) / "stages" / "2").exists()
    resumed = train_stages(replace(config, resume=True), show_progress=False).output
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_trained_further(config: TrainConfig) -> None:
    first, *later = stages_of(replace(config, lora=LoraSettings(rank=2)))
    assert (first.lora, first.adapter) == (LoraSettings(rank=2), "merge")
    assert all((stage.lora, stage.adapter) == (None, "continue") for stage in later)
    train_stages(replace(config, lora=LoraSettings(rank=2)), show_progress=False)
    assert (Path(config.output) / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"loss": "simpo"}, "no reference"), ({"mix": (1.0, 1.0, 1.0)}, "mix"), ({}, "several")],
)
def test_settings_that_fit_no_stages_are_refused(
    config: TrainConfig, changes: dict[str, Any], words: str
) -> None:
    data = config.data if changes else [config.data[0]]
    with pytest.raises(ConfigError, match=words):
        stages_of(replace(config, data=data, **changes))
