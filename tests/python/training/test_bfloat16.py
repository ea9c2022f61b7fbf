"""Frozen matrices in bfloat16 give the same bits as autocast; adapters stay near float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from logratio.logps.checks import batch_of
from logratio.logps.completion import score, transformer
from logratio.training import LoraSettings
from logratio.training.bfloat16 import InputDtypeLinear, held_in_bfloat16, with_bfloat16_adapters
from logratio.training.config import Precision
from logratio.training.lora import with_lora
from logratio.training.memory import frozen_bytes
from logratio.training.models import autocast, load_model

CPU = torch.device("cpu")
GROUPS = [
    ([1, 5, 6, 7, 3, 9], [[4, 8, 11, 2], [12, 3, 2]]),
    ([1, 10, 13], [[6, 6, 14, 15, 2], [9, 2]]),
    ([1, 3], [[17, 2], [18, 19, 5, 2]]),
]
LOW: tuple[Precision, ...] = ("bf16", "bf16-weights")
MATRICES = (nn.Linear, Conv1D)
BOTH = {torch.float32, torch.bfloat16}


class Casts(TorchDispatchMode):
    """Records the storage of each floating tensor that is copied to another floating dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::_to_copy" and {args[0].dtype, out.dtype} == BOTH:
            self.sources.append(args[0].untyped_storage().data_ptr())
        return out


def matrices(model: nn.Module) -> set[int]:
    found = (module.weight for module in model.modules() if isinstance(module, MATRICES))
    return {weight.untyped_storage().data_ptr() for weight in found}


def logps(model: nn.Module, precision: Precision, groups: Any = GROUPS) -> Tensor:
    with autocast(precision, CPU):
        return score(model, batch_of(groups, "shared"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_frozen_matrices_are_not_cast_and_give_the_same_bits(family: str) -> None:
    plain: PreTrainedModel = tiny(FAMILIES[family]()).requires_grad_(False)
    held = held_in_bfloat16(copy.deepcopy(plain))
    with torch.no_grad(), Casts() as before:
        expected = logps(plain, "bf16")
    with torch.no_grad(), Casts() as after:
        found = logps(held, "bf16")
    assert torch.equal(found, expected)
    assert len(matrices(plain) & set(before.sources)) >= 8
    tied = {held.get_input_embeddings().weight.untyped_storage().data_ptr()}  # type: ignore[operator]
    assert matrices(held) & set(after.sources) <= tied
    assert {p.dtype for n, p in held.named_parameters() if "norm" in n or "ln_" in n} == {
        torch.float32
    }


def test_shared_weights_and_float32_modules_are_not_rounded() -> None:
    config = LlamaConfig(**FAMILIES["llama"]().to_diff_dict() | {"tie_word_embeddings": True})
    model = tiny(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model._keep_in_fp32_modules = ["o_proj"]
    held_in_bfloat16(model)
    kinds = {name: p.dtype for name, p in model.named_parameters() if p.dim() == 2}
    exact = {name.split(".")[-2] for name, kind in kinds.items() if kind == torch.float32}
    assert exact == {"embed_tokens", "o_proj"}


def test_load_model_rounds_frozen_models_and_the_forecast_agrees(tiny_model: Path) -> None:
    frozen = load_model(tiny_model, precision="bf16", frozen=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    expected, held = frozen_bytes(tiny_model, "bf16"), sum(p.nbytes for p in frozen.parameters())
    assert held == pytest.approx(expected, rel=0.02)  # norms
    trained = load_model(tiny_model, precision="bf16")
    assert {p.dtype for p in trained.parameters()} == {torch.float32}


def adapted(family: str, precision: Precision) -> Any:
    """A policy as in a run, with adapters that change the output."""
    base = tiny(FAMILIES[family](), scale=2.0).requires_grad_(False)
    base = base.bfloat16() if precision == "bf16-weights" else held_in_bfloat16(base)  # type: ignore[assignment]
    model: Any = with_lora(base, LoraSettings(rank=4), Path())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def adapters(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft's, which then sets it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", LOW)
def test_adapters_multiply_in_bfloat16_near_float64(family: str, precision: Precision) -> None:
    model = adapted(family, precision)
    truth, gradients = by_merging(model)
    found = logps(with_bfloat16_adapters(model), precision)
    assert float((found.detach().double() - truth).norm() / truth.norm()) < 0.02
    found.sum().backward()
    layers = adapters(model)
    assert len(layers) == len(gradients) >= 8
    for layer, (a, b) in zip(layers, gradients, strict=True):
        for matrix, expected in ((layer.lora_A.default, a), (layer.lora_B.default, b)):
            assert type(matrix) is InputDtypeLinear
            own: Any = matrix.weight.grad
            assert matrix.weight.dtype == own.dtype == torch.float32
            assert float((own.double() - expected).norm() / expected.norm()) < 0.1


def by_merging(model: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Log-probs, and d sum / dA and dB, in float64, by the chain rule from merged weights."""
    whole: Any = copy.deepcopy(transformer(model)).double()
    merged = []
    for layer in adapters(whole):
        base, a, b = layer.base_layer, layer.lora_A.default.weight, layer.lora_B.default.weight
        turned = isinstance(base, Conv1D)
        delta = layer.scaling["default"] * (b @ a).detach()
        base.weight.data += delta.t() if turned else delta
        base.weight.requires_grad_(True)
        b.data.zero_()
        merged.append((base.weight, turned, layer.scaling["default"]))
    factors = [
        (
            layer.lora_A.default.weight.detach().double(),
            layer.lora_B.default.weight.detach().double(),
        )
        for layer in adapters(model)
    ]
    parts = []
    for prompt, completions in GROUPS:
        for ids in completions:
            logits = whole(input_ids=torch.tensor([[*prompt, *ids]])).logits[
                0, len(prompt) - 1 : -1
            ]
            parts.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    truth = torch.cat(parts)
    truth.sum().backward()
    gradients = []
    for (weight, turned, scaling), (a, b) in zip(merged, factors, strict=True):
        g = scaling * (weight.grad.t() if turned else weight.grad)
        gradients.append((b.t() @ g, g @ a.t()))
    return truth.detach(), gradients


@pytest.mark.parametrize("precision", LOW)
def test_adapters_add_only_casts_of_their_weights(precision: Precision) -> None:
    """No result of an adapted layer goes through float32, and no input is cast twice."""

    def more_casts(model: Any) -> tuple[int, int]:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.no_grad(), Casts() as on:
            logps(model, precision)
        with torch.no_grad(), model.disable_adapter(), Casts() as off:
            logps(model, precision)
        of_weights, before = (sum(s in own for s in seen.sources) for seen in (on, off))
        return of_weights - before, len(on.sources) - len(off.sources) - (of_weights - before)

    model = adapted("llama", precision)
    layers = len(adapters(model))
    assert more_casts(model)[1] > layers  # as peft does it
    assert more_casts(with_bfloat16_adapters(model)) == (2 * layers, 0)


@pytest.mark.parametrize("precision", LOW)
def test_a_group_does_not_depend_on_its_batch(precision: Precision) -> None:
    """Other tokens in the batch change no bit; other shapes may select other kernels."""
    model = with_bfloat16_adapters(adapted("llama", precision))
    first, *others = GROUPS
    changed = [([9] * len(prompt), [[7] * len(ids) for ids in sides]) for prompt, sides in others]
    own = sum(map(len, first[1]))
    with torch.no_grad():
        found = [logps(model, precision, [first, *rest]) for rest in (others, changed, [])]
    together, beside_others, alone = (each[:own] for each in found)
    assert torch.equal(together, beside_others)
    assert not torch.equal(found[0][own:], found[1][own:])
    assert torch.allclose(together, alone, rtol=0, atol=0.02)
