"""Optimizers: AdamW equals its paper on every device, and its state is saved bit for bit."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stop_after import stop_after
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.errors import ConfigError
from logratio.extras import MissingExtraError
from logratio.training import LoraSettings, TrainConfig, memory, optimizers, train
from logratio.training import update as update_module
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.config import OptimizerName, Precision
from logratio.training.fingerprint import parameter_count
from logratio.training.optimizers import (
    AdamSettings,
    MasterAdamW,
    clip_gradients,
    make_optimizer,
    state_bytes,
    widen_gradients,
)
from logratio.training.trainer import DPOTrainer

STEPS, LR = 7, 3e-3
EXACT: tuple[OptimizerName, ...] = ("adamw", "adamw-host")


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in [(5, 4), (3,), (1, 9, 2)]]


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(100 + step)
    scale = 10.0 ** (step % 3 - 2)
    return [(scale * torch.randn(p.shape)).to(dtype) for p in parameters(dtype)]


def oracle(start: Sequence[Tensor], steps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Algorithm 2 of arXiv 1711.05101 without decay, in float64, one number after the other."""
    result = []
    for number, weight in enumerate(start):
        theta = weight.detach().double().clone()
        m = v = torch.zeros_like(theta)
        for t, grads in enumerate(steps, 1):
            g = grads[number].double()
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            theta = theta - LR * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        result.append(theta)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_a_step_is_that_of_the_paper(name: OptimizerName, dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    expected = oracle(weights, [gradients(step, dtype) for step in range(STEPS)])
    optimizer = make_optimizer(name, weights, AdamSettings(LR))
    for step in range(STEPS):
        for weight, gradient in zip(weights, gradients(step, dtype), strict=True):
            weight.grad = gradient
        optimizer.step()
    for weight, truth in zip(weights, expected, strict=True):
        exact = optimizer.state[weight].get("master", weight.detach())
        assert exact.dtype == torch.float32
        assert torch.allclose(exact.double(), truth, rtol=0, atol=1e-6)
        assert torch.equal(weight, exact.to(dtype))


def test_float32_on_the_host_is_torch_s_own_to_the_bit() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    one, other = (
        make_optimizer("adamw-host", ours, AdamSettings(LR)),
        make_optimizer("adamw", theirs, AdamSettings(LR)),
    )
    assert isinstance(one, MasterAdamW)
    assert isinstance(other, torch.optim.AdamW)
    for step in range(STEPS):
        for weights, optimizer in ((ours, one), (theirs, other)):
            for weight, gradient in zip(weights, gradients(step, torch.float32), strict=True):
                weight.grad = gradient
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))


def test_updates_that_bfloat16_cannot_hold_are_not_lost() -> None:
    """1 + 1e-5 is 1 in bfloat16; a thousand such updates are 1.01."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = make_optimizer("adamw", [weight], AdamSettings(1e-5))
    for _ in range(1000):
        weight.grad = torch.full((1,), -0.5, dtype=torch.bfloat16)
        optimizer.step()
    assert float(optimizer.state[weight]["master"]) == pytest.approx(1.01, abs=1e-4)
    assert float(weight.detach()) == pytest.approx(1.01, abs=2**-8)
    assert float(weight.detach()) > 1


def test_a_weight_without_a_gradient_stays_and_a_closure_is_refused() -> None:
    first, second, _ = parameters(torch.bfloat16)
    optimizer, before = (
        MasterAdamW(AdamSettings(LR).groups([first, second])),
        first.detach().clone(),
    )
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert torch.equal(first, before)
    assert first not in optimizer.state
    with pytest.raises(ValueError, match="closures are not supported"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_state_bytes_are_those_of_the_state(name: OptimizerName, dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    optimizer = make_optimizer(name, weights, AdamSettings(LR))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()
    )
    expected = state_bytes(name, dtype, torch.device("cpu"))
    assert held == expected * sum(weight.numel() for weight in weights)
    assert state_bytes(name, dtype, torch.device("cuda")) == (
        0 if name == "adamw-host" else expected
    )


def test_gradients_are_clipped_by_their_norm_in_float32() -> None:
    weights = parameters(torch.float32)
    optimizer = make_optimizer("adamw", weights, AdamSettings(LR))
    for weight, gradient in zip(weights, gradients(2, torch.float32), strict=True):
        weight.grad = gradient
    truth = torch.cat([g.double().flatten() for g in gradients(2, torch.float32)]).norm()
    assert float(clip_gradients(optimizer, 0.25)) == pytest.approx(float(truth), rel=1e-6)
    now = torch.cat([w.grad.double().flatten() for w in weights if w.grad is not None]).norm()
    assert float(now) == pytest.approx(0.25, rel=1e-6)
    assert float(clip_gradients(optimizer, 10.0)) == pytest.approx(float(now), rel=1e-6)
    unchanged = torch.cat([w.grad.double().flatten() for w in weights if w.grad is not None])
    assert float(unchanged.norm()) == float(now)


@pytest.mark.parametrize("most", [0.25, 1e6])
@pytest.mark.parametrize("name", EXACT)
def test_clipping_rounds_no_bfloat16_gradient_again(name: OptimizerName, most: float) -> None:
    """The paper's update with gradients that are scaled in float64."""
    weights, low = parameters(torch.bfloat16), torch.bfloat16
    steps = [gradients(step, low) for step in range(STEPS)]
    norms = [torch.cat([g.double().flatten() for g in step]).norm() for step in steps]
    scales = [(most / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
    clipped = [[g.double() * s for g in step] for step, s in zip(steps, scales, strict=True)]
    expected = oracle(weights, clipped)
    optimizer = make_optimizer(name, weights, AdamSettings(LR))
    for step, norm in zip(steps, norms, strict=True):
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient
        assert float(clip_gradients(optimizer, most)) == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
    for weight, truth in zip(weights, expected, strict=True):
        exact = optimizer.state[weight]["master"].double()
        assert torch.allclose(exact, truth, rtol=0, atol=1e-6)


def test_many_micro_batches_are_added_up_in_float32() -> None:
    """256 shares of an update: the sum is exact, where bfloat16 stops growing."""
    weight = nn.Parameter(torch.ones(64, 8, dtype=torch.bfloat16))
    torch.manual_seed(0)
    inputs = (1 + 0.1 * torch.randn(256, 64, 8)).bfloat16()
    rounded = torch.zeros(64, 8, dtype=torch.bfloat16)
    for number, share in enumerate(inputs):
        if number:
            widen_gradients([weight])
        (weight * share).sum().backward()
        rounded += share
        assert weight.grad is not None
        assert weight.grad.dtype == (torch.float32 if number else torch.bfloat16)
    truth = inputs.double().sum(0)
    total = weight.grad
    assert total is not None
    assert float(((total.double() - truth).abs() / truth).max()) < 1e-6
    assert float(((rounded.double() - truth).abs() / truth).max()) > 0.01  # what it was before
    optimizer = make_optimizer("adamw", [weight], AdamSettings(LR))
    clip_gradients(optimizer, 1.0)
    optimizer.step()
    expected = oracle([torch.ones(64, 8)], [[truth / truth.norm()]])[0]
    assert torch.allclose(optimizer.state[weight]["master"].double(), expected, rtol=0, atol=1e-6)
    weight.grad = None
    (weight * inputs[0]).sum().backward()  # the next update begins in the weights' dtype again
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_a_step_is_a_few_operations_over_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same to the bit, however the weights are parted into lists."""
    trained = []
    for most in (2**26, 23, 1):
        monkeypatch.setattr(optimizers, "AT_ONCE", most)
        weights = parameters(torch.bfloat16)
        optimizer = make_optimizer("adamw", weights, AdamSettings(LR))
        for step in range(STEPS):
            for weight, gradient in zip(weights, gradients(step, torch.bfloat16), strict=True):
                weight.grad = gradient
            with Operations() as seen:
                optimizer.step()
        lists = {2**26: 1, 23: 2, 1: 3}[most]
        assert seen.names.count("aten::_fused_adamw_") == lists
        assert seen.names.count("aten::_foreach_copy_") == 2 * lists
        trained.append([optimizer.state[weight]["master"] for weight in weights])
    assert all(map(torch.equal, trained[0], trained[1]))
    assert all(map(torch.equal, trained[0], trained[2]))


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", lr=1e-3, batch_size=4, epochs=2, save_every=0
    )


@pytest.mark.parametrize(
    ("name", "precision", "lora"),
    [
        ("adamw", "bf16-weights", None),
        ("adamw-host", "fp32", None),
        ("adamw-host", "bf16-weights", None),
        ("adamw-host", "bf16-weights", LoraSettings(rank=4)),
    ],
)
def test_resume_is_bitwise(
    config: TrainConfig,
    tmp_path: Path,
    name: OptimizerName,
    precision: Precision,
    lora: LoraSettings | None,
) -> None:
    config = dataclasses.replace(config, optimizer=name, precision=precision, lora=lora)
    straight = dataclasses.replace(config, output=tmp_path / "straight")
    train(straight, show_progress=False)
    with pytest.raises(RunInterruptedError), stop_after(3):
        train(config, show_progress=False)
    train(dataclasses.replace(config, resume=True), show_progress=False)
    one, other = (
        load_file(next((tmp_path / out).glob("*model.safetensors"))) for out in ("straight", "out")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    logs = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("straight", "out")]
    assert logs[0] == logs[1]
    low = torch.bfloat16 if precision == "bf16-weights" and lora is None else torch.float32
    assert {value.dtype for value in one.values()} == {low}


def test_a_run_is_not_resumed_with_another_optimizer(config: TrainConfig) -> None:
    with pytest.raises(RunInterruptedError), stop_after(2):
        train(config, show_progress=False)
    with pytest.raises(ValueError, match="differs in optimizer"):
        train(dataclasses.replace(config, resume=True, optimizer="adamw-host"), show_progress=False)


def test_impossible_optimizers_are_refused_at_the_start(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="must be one of adamw, adamw8bit, adamw-host"):
        train(dataclasses.replace(config, optimizer="sgd"))  # type: ignore[arg-type]
    few = dataclasses.replace(config, optimizer="adamw8bit")
    with pytest.raises(ConfigError, match="would lose most updates"):
        train(dataclasses.replace(few, precision="bf16-weights"))
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(MissingExtraError, match=r"logratio\[quantized\]"):
            train(few)


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        ({}, 4 + 4 + 8),
        ({"precision": "bf16"}, 4 + 4 + 8),
        ({"precision": "bf16-weights"}, 2 + 4 + 12),
        ({"optimizer": "adamw8bit"}, 4 + 4 + 2),
        ({"optimizer": "adamw-host"}, 4 + 4 + 8),
        ({"lora": LoraSettings(), "precision": "bf16-weights"}, 2 + 0.01 * 16),
    ],
)
def test_the_forecast_knows_the_bytes_of_a_weight(
    config: TrainConfig, changes: dict[str, object], each: float
) -> None:
    changed = dataclasses.replace(config, device="cpu", **changes)  # type: ignore[arg-type]
    count = parameter_count(config.model)
    assert memory.training_bytes(changed, None) == pytest.approx(each * count)
    embeddings = 20 * 32  # which a frozen model keeps in float32 under bf16
    low = {"bf16-weights": 2.0, "bf16": 2 + 2 * embeddings / count}
    reference = low.get(changed.precision or "", 4.0)
    both = memory.training_bytes(changed, config.model)
    assert both == pytest.approx((each + reference) * count)


@pytest.mark.parametrize(
    ("token_budget", "dtype", "each"),
    [(8, torch.float32, 2 + 4 + 12), (10**6, torch.bfloat16, 2 + 2 + 12)],
)
def test_a_run_adds_up_in_float32_where_the_forecast_says_so(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    token_budget: int,
    dtype: torch.dtype,
    each: int,
) -> None:
    config = dataclasses.replace(config, precision="bf16-weights", token_budget=token_budget)
    seen = set[torch.dtype]()

    def noted(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
        for group in optimizer.param_groups:
            seen.update(p.grad.dtype for p in group["params"])
        return clip_gradients(optimizer, most)

    monkeypatch.setattr(update_module, "clip_gradients", noted)
    ready = DPOTrainer(config=dataclasses.replace(config, epochs=1), show_progress=False)
    added_up = not memory.fits_at_once(config, ready.store)
    expected = memory.training_bytes(config, None, added_up=added_up)
    assert expected == pytest.approx(each * parameter_count(config.model))
    ready.train()
    assert seen == {dtype}


class Operations(TorchDispatchMode):
    """Records the name of each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_clipping_is_over_lists_and_to_the_bit_what_one_by_one_gives() -> None:
    dtype = torch.float32
    for most in (0.25, 1e6):
        weights, alone = parameters(dtype), gradients(2, dtype)
        optimizer = make_optimizer("adamw", weights, AdamSettings(LR))
        for weight, gradient in zip(weights, gradients(2, dtype), strict=True):
            weight.grad = gradient
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in alone]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for gradient in alone:
            gradient.mul_((most / (norm + 1e-6)).clamp(max=1.0))
        with Operations() as seen:
            assert torch.equal(clip_gradients(optimizer, most), norm)
        assert all(
            torch.equal(w.grad, g)
            for w, g in zip(weights, alone, strict=True)
            if w.grad is not None
        )
        assert ("aten::_foreach_mul_" in seen.names) == (most < 1)
        assert "aten::mul_" not in seen.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_and_the_moments_rates_are_adamw_s(dtype: torch.dtype) -> None:
    """Against AdamW written out in float64; norms and biases do not decay."""
    settings = AdamSettings(1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    matrix = nn.Parameter(torch.randn(4, 3, generator=torch.manual_seed(0)).to(dtype))
    bias = nn.Parameter(torch.randn(3, generator=torch.manual_seed(1)).to(dtype))
    optimizer = make_optimizer("adamw", [matrix, bias], settings)
    expected = {}
    for parameter, decay in ((matrix, 0.1), (bias, 0.0)):
        value = parameter.detach().double()
        first, second = torch.zeros_like(value), torch.zeros_like(value)
        for step in range(1, 4):
            gradient = torch.full_like(value, 0.5 / step)
            first = 0.8 * first + 0.2 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            value = value * (1 - 1e-2 * decay)
            moved = (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
            value = value - 1e-2 * moved
        expected[parameter] = value
    for step in range(1, 4):
        for parameter in (matrix, bias):
            parameter.grad = torch.full_like(parameter, 0.5 / step)
        optimizer.step()
    for parameter, value in expected.items():
        exact = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(parameter.detach().double(), value, rtol=0, atol=exact)


def test_without_decay_all_weights_are_one_group() -> None:
    """So checkpoints of earlier versions load."""
    weights = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    assert len(make_optimizer("adamw", weights, AdamSettings(LR)).param_groups) == 1
