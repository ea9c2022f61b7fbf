"""The recipes are valid settings, and their memory figures are the forecast's."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from recipe_models import ARCHITECTURES, on_meta, write_headers
from repository import ROOT
from stores import store_of
from torch import nn

from logratio._rust import Store
from logratio.forecast import size
from logratio.training import TrainConfig, memory
from logratio.training.fingerprint import parameter_count
from logratio.training.models import weights_dtype
from logratio.training.optimizers import state_bytes

PAGE = (ROOT / "python" / "docs" / "recipes.md").read_text()
RECIPES: Mapping[str, str] = dict(re.findall(r"^## (.+?)\n\n```yaml\n(.*?)^```", PAGE, re.M | re.S))
FIGURES: Mapping[str, str] = dict(re.findall(r"^\| (\d.*?) \| (.*) \|$", PAGE, re.M))
GPU = torch.device("cuda")
"""Named only: nothing is allocated on it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("models")
    named = {name: one for name, one in ARCHITECTURES.items() if f"model: {name}\n" in PAGE}
    return {name: write_headers(root / name, one) for name, one in named.items()}


@pytest.fixture(scope="module")
def store() -> Store:
    """Pairs whose updates take several micro-batches, as with real data."""
    return store_of(*[(500, [300, 400])] * 200)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecast for a GPU, without one and without its speed."""
    monkeypatch.setattr(memory, "default_device", lambda _device: GPU)
    monkeypatch.setattr(memory, "seconds", lambda *_: 0.0)


def settings(name: str, folders: Mapping[str, Path], tmp_path: Path) -> TrainConfig:
    file = tmp_path / "run.yaml"
    file.write_text(RECIPES[name])
    config = TrainConfig.from_yaml(file)
    return dataclasses.replace(config, model=folders[str(config.model)])


def test_every_recipe_has_a_row() -> None:
    assert RECIPES.keys() == FIGURES.keys()
    assert len(RECIPES) == 4


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("on_gpu")
def test_the_figures_are_the_forecast(
    name: str, folders: Mapping[str, Path], store: Store, tmp_path: Path
) -> None:
    config = settings(name, folders, tmp_path)
    count = parameter_count(config.model)
    on_host = state_bytes(config.optimizer, torch.bfloat16, torch.device("cpu")) * count
    shown = [
        f"{count / 1e9:.2f} billion",
        size(memory.training_bytes(config, None)),
        size(on_host) if config.optimizer == "adamw-host" else "none",
        size(memory.training_forecast(config, store).memory_bytes),
    ]
    assert FIGURES[name] == " | ".join(shown)


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def bytes_in_4_bits(model: nn.Module) -> float:
    """Bytes if all linear layers but the head take 4 bits, and a float32 scale per 64 weights."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    weights = sum(one.weight.numel() for name, one in layers.items() if name != "lm_head")
    return bytes_of(model) - 2 * weights + weights / 2 + 4 * weights / 64


def state_of_adamw(model: nn.Module) -> int:
    """Bytes of torch's AdamW after a step, which runs on the meta device."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    states = [state for one in optimizer.state.values() for state in one.values()]
    return sum(state.numel() * state.element_size() for state in states if state.dim())


@pytest.mark.parametrize("name", [name for name in RECIPES if "full" in name])
@pytest.mark.usefixtures("on_gpu")
def test_full_training_takes_the_bytes_of_the_model_s_parameters(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    config = settings(name, folders, tmp_path)
    made = partial(on_meta, ARCHITECTURES[Path(config.model).name])
    weights = bytes_of(made(weights_dtype(config.precision or "fp32")))
    gradients = bytes_of(made(torch.float32))
    states = state_of_adamw(made(torch.float32)) if config.optimizer == "adamw" else 0
    assert memory.training_bytes(config, None) == weights + gradients + states


@pytest.mark.parametrize("name", [name for name in RECIPES if "LoRA" in name])
@pytest.mark.usefixtures("on_gpu")
def test_lora_takes_at_most_the_forecast(
    name: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = settings(name, folders, tmp_path)
    assert config.lora
    base = on_meta(ARCHITECTURES[Path(config.model).name], torch.bfloat16)
    frozen = bytes_in_4_bits(base) if config.quantization == "4bit" else bytes_of(base)
    how = LoraConfig(r=config.lora.rank, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what transformers renamed
        model = get_peft_model(base, how)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    exact = frozen + adapters * (4 + 4 + 8)  # weights, gradients and moments in float32
    forecast = memory.training_bytes(config, None)
    assert exact <= forecast < 1.2 * exact
