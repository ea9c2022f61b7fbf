"""The default precision: bf16 on a GPU, fp32 on a CPU, and one choice for every command."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from logratio.training import EvaluateConfig, PrecomputeConfig, TrainConfig, models, train
from logratio.training.models import default_precision, precision_of
from logratio.training.reference import StaleCacheError
from logratio.training.reference_pass import prepare as prepare_pass
from logratio.training.run_folder import identity, settings_of
from logratio.training.trainer import prepare

CUDA = torch.device("cuda")


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", batch_size=8, save_every=0, device="cpu"
    )


@pytest.fixture
def default_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose on this CPU as on a GPU."""
    chosen = models.default_precision
    monkeypatch.setattr(models, "default_precision", lambda _: chosen(CUDA))


def test_it_depends_on_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_precision(torch.device("cpu")) == "fp32"
    assert default_precision(CUDA) == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: False)
    assert default_precision(CUDA) == "fp32"  # before Ampere, bf16 is emulated


def test_what_is_asked_for_is_taken(config: TrainConfig, default_is_bf16: None) -> None:
    assert precision_of(config) == "bf16"
    assert precision_of(dataclasses.replace(config, precision="fp32")) == "fp32"
    remote = PrecomputeConfig(config.model, config.data, "cache", engine="ray", device="cuda")
    assert precision_of(remote) == "bf16"  # without a GPU here


def test_all_commands_agree_before_the_first_fingerprint(
    config: TrainConfig, default_is_bf16: None, tmp_path: Path
) -> None:
    """A cache that `precompute` fills with the default is a hit for `train` with the default."""
    cache = tmp_path / "cache"
    wanted = PrecomputeConfig(config.model, config.data, cache, device="cpu")
    scored = prepare_pass(wanted, show_progress=False)
    assert "precision bf16 (default on this device)" in scored.forecast.notes
    assert scored.fingerprint.precision == "bf16"
    assert scored.run().new > 0
    assert identity(config) == identity(dataclasses.replace(config, precision="bf16"))
    evaluated = EvaluateConfig(config.model, config.model, config.data, device="cpu")
    assert precision_of(evaluated) == "bf16"
    trained = train(dataclasses.replace(config, cache=cache), show_progress=False)
    settings = settings_of(trained.output)
    assert settings is not None
    assert settings["precision"] == settings["identity"]["precision"] == "bf16"
    assert settings["deterministic"] is False


def test_a_miss_names_the_precision_as_its_cause(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    prepare_pass(PrecomputeConfig(config.model, config.data, cache, device="cpu")).run()
    monkeypatch.setattr(models, "default_precision", lambda _: "bf16")
    with pytest.raises(StaleCacheError) as missed:
        prepare(dataclasses.replace(config, cache=cache), show_progress=False)
    assert "was filled with --precision fp32, and this run computes in bf16" in str(missed.value)
    assert "give --precision fp32 here" in str(missed.value)
    # A cache of another model is no matter of precision.
    for path in cache.glob("*/fingerprint.json"):
        fields = json.loads(path.read_text())
        assert fields["hard"]["compute_dtype"] == "float32"
