"""Sizes of models from their config: published counts, and the same bytes as the forecast's."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from recipe_models import ARCHITECTURES, write_headers
from small_configs import small_config

from logratio.errors import ConfigError
from logratio.training import LoraSettings, TrainConfig, load_model, memory
from logratio.training.config import Precision, Quantization
from logratio.training.lora import with_lora
from logratio.training.model_shape import ModelShape, frozen_shape, policy_shape
from logratio.training.models import weights_dtype
from logratio.training.optimizers import gradient_bytes, state_bytes
from logratio.training.speed import Work

PUBLISHED = {
    "qwen2.5-1.5b": 1_543_714_304,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}
"""Parameters on the models' pages on the hub."""
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders with a config.json each, and nothing else but the headers of the smaller models."""
    root = tmp_path_factory.mktemp("models")
    for name, config in ARCHITECTURES.items():
        if "405b" in name:
            config.save_pretrained(root / name)
        else:
            write_headers(root / name, config)
    return {name: root / name for name in ARCHITECTURES}


def settings(folder: Path, precision: Precision = "bf16-weights", **more: object) -> TrainConfig:
    return TrainConfig(folder, "data", "out", precision=precision, device="meta", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_count(name: str, folders: Mapping[str, Path]) -> None:
    shape = policy_shape(settings(folders[name]))
    assert shape.parameters == shape.trained == PUBLISHED[name]
    assert len(shape.layers) == ARCHITECTURES[name].num_hidden_layers


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.1-8b", "llama-3.1-70b"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_a_frozen_model_takes_the_bytes_of_the_forecast(
    name: str, precision: Precision, quantization: Quantization | None, folders: Mapping[str, Path]
) -> None:
    """The forecast counts norms and biases in bfloat16 too, so it is a little less exact."""
    shape = frozen_shape(folders[name], precision, quantization)
    assert shape.trained == 0
    forecast = memory.frozen_bytes(folders[name], precision, quantization)
    assert shape.stored == pytest.approx(forecast, rel=1e-2)


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.1-8b", "llama-3.1-70b"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_a_trained_model_takes_the_bytes_of_the_forecast(
    name: str, precision: Precision, folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "default_device", lambda _: GPU)
    config, shape = (
        settings(folders[name], precision),
        policy_shape(settings(folders[name], precision)),
    )
    dtype = weights_dtype(precision)
    own = gradient_bytes(dtype, added_up=True) + state_bytes("adamw", dtype, GPU)
    assert shape.stored + own * shape.trained == memory.training_bytes(config, None)


def test_adapters_are_trained_in_float32_over_a_frozen_base(folders: Mapping[str, Path]) -> None:
    config = settings(folders["llama-3.1-8b"], lora=LoraSettings(rank=16))
    shape, base = policy_shape(config), frozen_shape(config.model, "bf16-weights", None)
    assert shape.trained == 41_943_040  # 16 x the inputs and outputs of 7 layers, 32 times
    assert shape.stored == base.stored + 4 * shape.trained
    assert shape.root.trained == 0
    quantized = policy_shape(dataclasses.replace(config, quantization="4bit"))
    assert quantized.trained == shape.trained
    assert 0.25 * shape.stored < quantized.stored < 0.4 * shape.stored


def test_float32_weights_are_gathered_in_the_dtype_of_the_products(
    folders: Mapping[str, Path],
) -> None:
    shapes = [policy_shape(settings(folders["llama-3.1-8b"], p)) for p in ("fp32", "bf16")]
    plain, mixed = ([unit.gathered for unit in shape.layers] for shape in shapes)
    assert shapes[0].stored == shapes[1].stored
    assert [2 * count for count in mixed] == plain
    assert shapes[0].root == shapes[1].root  # its products are cast at each use


@pytest.mark.parametrize("rank", [None, 4])
def test_flops_are_those_of_the_loaded_model(
    rank: int | None, make_model: Callable[..., Path]
) -> None:
    folder = make_model("model")
    lora = LoraSettings(rank=rank) if rank else None
    model = load_model(folder)
    work = Work.of(with_lora(model, lora, folder) if lora else model)
    shape = policy_shape(TrainConfig(folder, "data", "out", lora=lora))
    # Norms outside of the layers have no products; `Work` counts their few weights.
    assert shape.flops(100, 50) == pytest.approx(work.flops(100, 50), rel=0.02)
    assert shape.flops(0, 50) == work.flops(0, 50)


def test_tied_weights_count_once(folders: Mapping[str, Path]) -> None:
    root = policy_shape(settings(folders["qwen2.5-1.5b"])).root
    assert root.trained == 151_936 * 1536 + 1536
    assert root.forward == 2 * 151_936 * 1536


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    config = ARCHITECTURES["llama-3.1-8b"].to_dict() | {"quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="plan with the model that it was made from"):
        policy_shape(settings(tmp_path))


def test_attention_counts_two_products_per_pair_of_tokens(folders: Mapping[str, Path]) -> None:
    shape: ModelShape = policy_shape(settings(folders["llama-3.1-8b"]))
    assert shape.attention == 2 * 2 * 4096


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_a_model_without_heads_has_no_attention(kind: str, tmp_path: Path) -> None:
    small_config(kind).save_pretrained(tmp_path)
    shape = policy_shape(settings(tmp_path, "fp32"))
    assert shape.attention == 0
    assert shape.parameters > 0
