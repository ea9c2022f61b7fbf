"""Training gives the same weights with a warm cache, a cold cache and none."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from safetensors.torch import load_file
from torch import Tensor, nn

from logratio.errors import ConfigError
from logratio.logps.checks import batch_of
from logratio.training import (
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    load_model,
    precompute,
    train,
)
from logratio.training import models as models_module
from logratio.training import trainer as trainer_module
from logratio.training.lora import with_lora
from logratio.training.policy import build_policy
from logratio.training.reference import AdapterReference, FrozenReference, StaleCacheError
from logratio.training.trainer import DPOTrainer


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", lr=1e-3, batch_size=4, epochs=2, save_every=0
    )


def with_(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def fill(config: TrainConfig, cache: Path) -> Path:
    precompute(PrecomputeConfig(config.model, config.data, cache), show_progress=False)
    return cache


def weights(config: TrainConfig, output: Path) -> dict[str, Tensor]:
    train(with_(config, output=output), show_progress=False)
    name = "adapter_model.safetensors" if config.lora else "model.safetensors"
    return load_file(output / name)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def dropout(monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Path]) -> Iterator[Path]:
    """A policy with 30 % attention dropout, which the trainer itself never uses."""
    folder = make_model("dropout")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.3}))
    build = build_policy

    def dropping(*arguments: object) -> nn.Module:
        return build(*arguments).train()  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(models_module, "without_dropout", lambda model: model)
        patch.setattr(trainer_module, "build_policy", dropping)
        yield folder


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
def test_warm_cold_and_live_train_the_same_weights(
    config: TrainConfig, tmp_path: Path, dropout: Path, lora: LoraSettings | None
) -> None:
    """TRL's cold cache draws from the generator that its dropout then uses; a warm one does not."""
    config = with_(config, model=dropout, lora=lora)
    live = weights(config, tmp_path / "live")
    cold = with_(config, cache=tmp_path / "cold", precompute=True)
    filled_before = weights(cold, tmp_path / "filled_before")
    again = weights(cold, tmp_path / "again")
    warm = with_(config, cache=fill(config, tmp_path / "warm"))
    filled_elsewhere = weights(warm, tmp_path / "filled_elsewhere")
    assert equal(filled_before, again)
    assert equal(filled_before, filled_elsewhere)
    for name, value in live.items():
        assert torch.allclose(value, filled_before[name], atol=1e-5), name


def test_that_dropout_was_on(
    config: TrainConfig, tmp_path: Path, tiny_model: Path, dropout: Path
) -> None:
    """Equal weights without it: the test above would prove nothing."""
    off = weights(config, tmp_path / "off")
    on = weights(with_(config, model=dropout), tmp_path / "on")
    assert not equal(off, on)


def test_a_model_with_dropout_in_its_config_trains_without(
    config: TrainConfig, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    folder = make_model("model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": 0.3}))
    cache = fill(config, tmp_path / "cache")  # of the same model without: the same reference
    with_dropout = weights(with_(config, model=folder, cache=cache), tmp_path / "on")
    assert equal(weights(config, tmp_path / "off"), with_dropout)


@pytest.mark.parametrize("kind", ["frozen", "adapter"])
def test_a_live_reference_draws_no_number_and_leaves_the_mode(
    tiny_model: Path, dropout: Path, kind: str
) -> None:
    model = load_model(dropout)
    if kind == "adapter":
        model = with_lora(model, LoraSettings(rank=2), dropout)
    model.train()
    batch = batch_of([([3, 4, 5], [[6, 7], [8]])], "shared")
    reference = AdapterReference(model) if kind == "adapter" else FrozenReference(model)
    before = torch.get_rng_state()
    first = reference.logps(batch)
    assert torch.equal(first, reference.logps(batch))
    assert torch.equal(before, torch.get_rng_state())
    if kind == "adapter":
        assert all(module.training for module in model.modules())


CHANGES: dict[str, dict[str, object]] = {
    "learning rate": {"lr": 5e-4},
    "warmup": {"warmup": 0.5},
    "clipping": {"max_grad_norm": 9.0},
    "seed": {"seed": 7},
    "batch size": {"batch_size": 3},
    "epochs": {"epochs": 5},
    "checkpoints": {"save_every": 1},
    "beta": {"beta": 0.5},
    "loss": {"loss": "ipo"},
    "label smoothing": {"label_smoothing": 0.1},
    "token budget": {"token_budget": 64},
    "adapters": {"lora": LoraSettings(rank=4)},
    "adapters of another rank": {"lora": LoraSettings(rank=8, alpha=1.0), "seed": 3},
    "the reference by name": {"reference": "model"},
    "bad rows allowed": {"max_bad_fraction": 0.5},
    "a mixture": {"mix": (2.0,)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_does_not_change_the_reference_hits(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    """TRL throws its cache away for a learning rate, an output folder and an adapter's seed."""
    cache = fill(config, tmp_path / "cache")
    changes = dict(CHANGES[name])
    if "reference" in changes:
        changes["reference"] = config.model
    other = with_(config, cache=cache, output=tmp_path / "elsewhere", **changes)
    assert DPOTrainer(config=other, show_progress=False).cached is not None
    again = DPOTrainer(config=with_(other, precompute=True), show_progress=False)
    assert "0 completions to score" in again.forecast.to_text()


def test_without_the_flag_a_missing_row_is_an_error_that_names_it(
    config: TrainConfig, tmp_path: Path
) -> None:
    few = with_(config, data=[write_pairs(tmp_path / "few.jsonl", 3)])
    cache = fill(few, tmp_path / "cache")
    with pytest.raises(StaleCacheError, match=r"26 of 32 .* precompute=True"):
        train(with_(config, cache=cache), show_progress=False)
    result = train(with_(config, cache=cache, precompute=True), show_progress=False)
    assert result.steps == 8


def test_the_flag_needs_a_cache(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="give its folder as cache"):
        train(with_(config, precompute=True), show_progress=False)


def test_a_dry_run_scores_nothing(config: TrainConfig, tmp_path: Path) -> None:
    ready = DPOTrainer(
        config=with_(config, cache=tmp_path / "cache", precompute=True), show_progress=False
    )
    assert "32 completions to score" in ready.forecast.to_text()
    assert not list((tmp_path / "cache").glob("*"))
