"""Adapters over a quantized base: exact gradients, the same reference as the cache, its memory."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from conftest import Run
from quantization_checks import KINDS, both
from quantization_checks import tiny_model as tiny_model
from rank_server import RankServer
from safetensors.torch import load_file
from stop_after import stop_after
from tiny_models import word_tokenizer
from torch import Tensor

from logratio.errors import ConfigError
from logratio.logps.checks import batch_of
from logratio.logps.completion import score
from logratio.training import (
    LoraSettings,
    PrecomputeConfig,
    QuantizationError,
    StaleCacheError,
    TrainConfig,
    load_model,
    merge_adapter,
    precompute,
    train,
)
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.config import Quantization
from logratio.training.memory import frozen_bytes
from logratio.training.policy import build_policy
from logratio.training.reference import AdapterReference
from logratio.training.trainer import DPOTrainer

GROUPS = [([1, 4, 5], [[8, 12, 2], [13, 2]]), ([1, 4, 6, 9], [[10, 17, 2], [11, 3, 18, 2]])]


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model,
        [pairs_file],
        tmp_path / "out",
        lr=1e-2,
        batch_size=4,
        epochs=4,
        save_every=0,
        lora=LoraSettings(rank=4),
        quantization="4bit",
    )


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in train(config, show_progress=False).history]


def moved(policy: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy


def in_float64(policy: Any, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradients of their sum, from dequantized weights in float64."""
    plain = load_model(folder).double().requires_grad_(False)
    factors, weights = {}, {}
    for name, layer in policy.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        base = layer.get_base_layer()
        whole = dequantize_4bit(base.weight.data, base.weight.quant_state).double()
        for which in "AB":
            own = getattr(layer, f"lora_{which}")["default"].weight
            leaf = own.detach().double().requires_grad_()
            factors[f"base_model.model.{name}.lora_{which}.default.weight"] = leaf
        a, b = [*factors.values()][-2:]
        weights[f"{name}.weight"] = whole + layer.scaling["default"] * (b @ a)
    found = []
    for prompt, completions in GROUPS:
        for ids in completions:
            row = torch.tensor([[*prompt, *ids]])
            output: Any = torch.func.functional_call(plain, weights, kwargs={"input_ids": row})
            logits = output.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logits.gather(1, torch.tensor(ids)[:, None])[:, 0])
    truth = torch.cat(found)
    truth.sum().backward()
    return truth.detach(), {
        name: leaf.grad for name, leaf in factors.items() if leaf.grad is not None
    }


def test_gradients_equal_those_of_dequantized_weights_in_float64(config: TrainConfig) -> None:
    """Also after a pass without gradients, in which bitsandbytes may change a layer's weights."""
    policy = moved(build_policy(config, "cpu"))
    batch = batch_of(GROUPS, "padded")
    AdapterReference(policy).logps(batch)
    found = score(policy, batch)
    found.sum().backward()
    truth, gradients = in_float64(policy, Path(config.model))
    assert torch.allclose(found.detach().double(), truth, rtol=0, atol=1e-4)
    trained = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    assert len(trained) == 28
    for name, gradient in trained.items():
        gap = (gradient.double() - gradients[name]).norm()
        assert float(gap) <= 1e-3 * float(gradients[name].norm()), name


@both
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights"])
def test_a_run_starts_at_ln_2_learns_and_keeps_its_base(
    config: TrainConfig, bits: Quantization, precision: Any
) -> None:
    config = replace(config, quantization=bits, precision=precision)
    trainer = DPOTrainer(config=config, show_progress=False)
    found = [row["loss"] for row in trainer.train().history]
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found[-1] < 0.5 * found[0]
    kinds = [m for m in trainer.updater.policy.modules() if isinstance(m, KINDS[bits])]
    assert len(kinds) == 14
    assert {p.dtype for p in trainer.updater.policy.parameters() if p.requires_grad} == {
        torch.float32
    }
    batch = batch_of(GROUPS, "padded")
    fresh = load_model(config.model, quantization=bits)
    if precision == "fp32":
        with torch.no_grad():
            assert torch.equal(
                score(fresh, batch), AdapterReference(trainer.updater.policy).logps(batch)
            )
    settings = json.loads((Path(config.output) / "training.json").read_text())
    assert settings["quantization"] == bits


@pytest.mark.parametrize("lora", [LoraSettings(4, use_dora=True), LoraSettings(4, dropout=0.2)])
def test_options_of_adapters_work_over_4_bits(config: TrainConfig, lora: LoraSettings) -> None:
    found = losses(replace(config, lora=lora))
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found[-1] < 0.6 * found[0]


def test_resume_is_bitwise(config: TrainConfig, tmp_path: Path) -> None:
    straight = losses(replace(config, output=tmp_path / "straight"))
    with pytest.raises(RunInterruptedError), stop_after(5):
        losses(config)
    assert losses(replace(config, resume=True)) == straight[5:]
    one, other = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "out")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@both
def test_the_cache_of_the_quantized_reference_is_its_own(
    config: TrainConfig, tmp_path: Path, bits: Quantization
) -> None:
    cache = tmp_path / "cache"
    config = replace(config, quantization=bits)
    cached = replace(config, cache=cache, output=tmp_path / "cached")
    whole = PrecomputeConfig(config.model, config.data, cache)
    precompute(whole, show_progress=False)
    with pytest.raises(StaleCacheError, match=f"no quantization.* has quantization {bits}"):
        losses(cached)
    precompute(replace(whole, quantization=bits), show_progress=False)
    assert losses(cached) == pytest.approx(losses(config), rel=1e-2, abs=1e-3)
    plain = replace(config, quantization=None, cache=cache, output=tmp_path / "plain")
    assert losses(plain)[0] == pytest.approx(math.log(2), abs=1e-4)
    filled = replace(config, cache=tmp_path / "new", precompute=True, output=tmp_path / "filled")
    assert losses(filled) == losses(replace(cached, output=tmp_path / "again"))


def test_an_adapter_over_a_quantized_base_is_trained_further(
    config: TrainConfig, tiny_model: Path, tmp_path: Path
) -> None:
    start = make_adapter(tiny_model, tmp_path / "start", target_modules="all-linear")
    further = replace(config, model=start, lora=None, adapter="continue")
    policy = build_policy(further, "cpu")
    expected = load_model(start, quantization="4bit")
    batch = batch_of(GROUPS, "padded")
    with torch.no_grad():
        assert torch.equal(AdapterReference(policy).logps(batch), score(expected, batch))
    found = losses(further)
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found[-1] < 0.8 * found[0]


@both
def test_the_forecast_matches_the_weights_in_memory(tiny_model: Path, bits: Quantization) -> None:
    model = load_model(tiny_model, quantization=bits)
    held = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held += parameter.nbytes
            state = getattr(parameter, "quant_state", None)
            held += 0 if state is None else state.absmax.nbytes
    assert frozen_bytes(tiny_model, "fp32", bits) == pytest.approx(held, rel=0.03)


def test_what_cannot_be_quantized_is_refused(
    config: TrainConfig, tiny_model: Path, tmp_path: Path
) -> None:
    dora = LoraSettings(use_dora=True)
    stored = tmp_path / "stored"
    load_model(tiny_model, quantization="4bit").save_pretrained(stored)  # type: ignore[operator]
    word_tokenizer().save_pretrained(stored)
    for changes, error, message in (
        ({"lora": None}, ConfigError, "quantized weights cannot be trained; train adapters"),
        ({"quantization": "8bit", "lora": dora}, ConfigError, "choose 4bit"),
        ({"model": stored}, QuantizationError, "already quantized"),
        ({"model": stored, "quantization": None, "lora": None}, ConfigError, "is quantized: "),
        ({"lora": LoraSettings(init="orthogonal")}, ConfigError, "not quantized"),
    ):
        with pytest.raises(error, match=message):
            DPOTrainer(config=replace(config, **changes))


def test_a_stored_quantized_base_is_trained_and_not_merged_into(
    config: TrainConfig, tiny_model: Path, tmp_path: Path
) -> None:
    stored = tmp_path / "stored"
    load_model(tiny_model, quantization="4bit").save_pretrained(stored)  # type: ignore[operator]
    word_tokenizer().save_pretrained(stored)
    found = losses(replace(config, model=stored, quantization=None))
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found[-1] < 0.8 * found[0]
    assert any(isinstance(m, Linear4bit) for m in load_model(config.output).modules())
    with pytest.raises(ConfigError, match="is quantized, and merging would round"):
        merge_adapter(config.output, tmp_path / "whole")


def test_flags_of_trl_select_4_bits(run: Run, config: TrainConfig, tmp_path: Path) -> None:
    code, _, err = run(
        *("train", "--model", config.model, "--data", config.data[0]),
        *("--output", tmp_path / "o", "--lora", "--load_in_4bit", "--max-steps", 1),
    )
    assert code == 0, err
    assert json.loads((tmp_path / "o" / "training.json").read_text())["quantization"] == "4bit"
    code, out, err = run("merge", "--model", tmp_path / "o", "--output", tmp_path / "whole")
    assert code == 0, err
    assert "trained over a base in 4bit" in err
    assert "largest difference" in out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_over_a_quantized_base(
    ranks: RankServer, config: TrainConfig, tmp_path: Path, parallel: str
) -> None:
    """Under FSDP2, each process quantizes the whole base, and keeps a shard of it."""
    settings = {
        **{"model": str(config.model), "data": [str(config.data[0])], "lr": 1e-2},
        **{"batch_size": 4, "lora": {"rank": 4}, "quantization": "4bit", "report": False},
    }
    alone, several = tmp_path / "alone", tmp_path / "several"
    ranks(1, "rank_workers:train", settings | {"output": str(alone)}).well()
    settings |= {"output": str(several), "parallel": parallel}
    ranks(2, "rank_workers:train", settings).well()
    one, other = (load_file(path / "adapter_model.safetensors") for path in (alone, several))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-5


def test_eight_bits_are_not_sharded(ranks: RankServer, config: TrainConfig, tmp_path: Path) -> None:
    settings = {
        **{"model": str(config.model), "data": [str(config.data[0])], "lora": {"rank": 4}},
        **{"quantization": "8bit", "parallel": "fsdp", "output": str(tmp_path / "out")},
    }
    ended = ranks(2, "rank_workers:train", settings)
    assert all(ended.codes)
    assert "attributes of the weight, which FSDP2 loses" in "".join(ended.printed)
