"""Quantized references are close to float32 but distinct; 8-bit moments train well."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stop_after import stop_after
from tiny_models import GROUPED, WORDS, tiny, word_tokenizer
from transformers import LlamaConfig

from logratio._rust import CacheReader
from logratio.extras import MissingExtraError
from logratio.logps.checks import choose_layout
from logratio.training import PrecomputeConfig, TrainConfig, load_model, precompute, train
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.config import Quantization
from logratio.training.fingerprint import model_fingerprint
from logratio.training.models import QuantizationError, is_quantized, precision_of, quietly
from logratio.training.optimizers import AdamSettings, make_optimizer, state_bytes
from logratio.training.precomputation import prepare

KINDS: dict[Quantization, type[torch.nn.Module]] = {"8bit": Linear8bitLt, "4bit": Linear4bit}
both = pytest.mark.parametrize("bits", KINDS)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the usual one: 4-bit kernels take 64 columns and 32 rows at a time."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {**GROUPED, "vocab_size": len(WORDS), "hidden_size": 64, "head_dim": 16}
    tiny(LlamaConfig(**sizes, pad_token_id=0), scale=2.0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> PrecomputeConfig:
    return PrecomputeConfig(tiny_model, [pairs_file], tmp_path / "cache", token_budget=64)


def values(config: PrecomputeConfig) -> torch.Tensor:
    result = precompute(config, show_progress=False)
    fingerprint = model_fingerprint(config.model, precision_of(config), config.quantization)
    reader = CacheReader.open(result.folder, fingerprint.digest)
    keys = prepare(config, show_progress=False).keys
    return torch.from_numpy(reader.read(reader.join(keys))[1])


@both
def test_linear_layers_have_quantized_weights(tiny_model: Path, bits: Quantization) -> None:
    model = load_model(tiny_model, quantization=bits)
    layers = [module for module in model.modules() if isinstance(module, KINDS[bits])]
    assert len(layers) == 14, "seven in each of two blocks; the head stays whole"
    assert choose_layout(model)[0] == "shared"


@both
def test_log_probs_are_near_those_of_float32_and_not_them(
    config: PrecomputeConfig, bits: Quantization
) -> None:
    whole = values(config)
    fewer = values(replace(config, quantization=bits))
    gap = float((fewer - whole).abs().mean())
    assert 0 < gap < {"8bit": 0.02, "4bit": 0.3}[bits]
    assert len(list(Path(config.cache).iterdir())) == 2, "a folder each"


@both
def test_quantization_is_a_hard_field(tiny_model: Path, bits: Quantization) -> None:
    whole, fewer = model_fingerprint(tiny_model), model_fingerprint(tiny_model, "fp32", bits)
    assert fewer.digest != whole.digest
    assert whole.differences(fewer.hard) == ["quantization"]
    assert len({model_fingerprint(tiny_model, "fp32", kind).digest for kind in KINDS}) == 2


def test_a_checkpoint_that_is_quantised_loads_as_it_is(
    config: PrecomputeConfig, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stored"
    word_tokenizer().save_pretrained(folder)
    model = load_model(tiny_model, quantization="4bit")
    model.save_pretrained(folder)  # type: ignore[operator]  # of transformers
    assert is_quantized(folder)
    assert any(isinstance(module, Linear4bit) for module in load_model(folder).modules())
    stored = values(replace(config, model=folder))
    loaded = values(replace(config, quantization="4bit"))
    assert torch.allclose(stored, loaded, atol=1e-4)
    with pytest.raises(QuantizationError, match="already"):
        prepare(replace(config, model=folder, quantization="8bit"))


@both
def test_an_adapter_over_a_quantised_base(
    config: PrecomputeConfig, tiny_model: Path, tmp_path: Path, bits: Quantization
) -> None:
    torch.manual_seed(3)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with quietly():
        adapted = get_peft_model(load_model(tiny_model), settings)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_model)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    word_tokenizer().save_pretrained(tmp_path / "adapter")
    own = replace(config, model=tmp_path / "adapter")
    whole, fewer = values(own), values(replace(own, quantization=bits))
    assert 0 < float((fewer - whole).abs().mean()) < {"8bit": 0.05, "4bit": 0.5}[bits]


def test_a_missing_library_names_its_extra(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'logratio\[quantized\]'$"):
        prepare(replace(config, quantization="8bit"))


def test_plain_weights_are_no_quantised_ones(tiny_model: Path) -> None:
    assert not is_quantized(tiny_model)
    assert "quantization_config" not in json.loads((tiny_model / "config.json").read_text())


@pytest.fixture
def training(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model,
        [pairs_file],
        tmp_path / "out",
        lr=3e-3,
        batch_size=4,
        epochs=4,
        save_every=0,
        optimizer="adamw8bit",
    )


def test_moments_in_8_bits_train_nearly_as_exact_ones(
    training: TrainConfig, tmp_path: Path
) -> None:
    exact = replace(training, optimizer="adamw", output=tmp_path / "exact")
    few, whole = (
        [row["loss"] for row in train(config, show_progress=False).history]
        for config in (training, exact)
    )
    assert few != whole
    assert few[-1] < 0.8 * few[0]
    assert few == pytest.approx(whole, abs=0.05)


def test_state_bytes_match_the_8_bit_state(tiny_model: Path) -> None:
    """Blocks of 256 share a float32 scale; small tensors stay in float32."""
    weight = torch.nn.Parameter(torch.randn(256, 256))
    optimizer = make_optimizer("adamw8bit", [weight], AdamSettings(1e-3))
    weight.grad = torch.randn(256, 256)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    expected = state_bytes("adamw8bit", torch.float32, weight.device) * weight.numel()
    held = sum(state[n].nbytes for n in ("state1", "state2", "absmax1", "absmax2"))
    assert expected <= held <= 1.05 * expected


def test_resume_is_bitwise_in_8_bits(training: TrainConfig, tmp_path: Path) -> None:
    straight = replace(training, output=tmp_path / "straight")
    train(straight, show_progress=False)
    with pytest.raises(RunInterruptedError), stop_after(5):
        train(training, show_progress=False)
    train(replace(training, resume=True), show_progress=False)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("straight", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
