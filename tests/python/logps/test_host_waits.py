"""Where a host would wait for a GPU, counted over a whole update on tensors that have no values.

Such tensors (torch's "meta" device) take the code's ways that are not a CPU's, and the counter
answers each question for a value. What only CUDA does is counted on fake CUDA tensors, which have
no autograd where there is no GPU.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_oracle import store_of
from random_groups import random_groups
from rewards import tiny_reward_model
from tiny_models import FAMILIES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from logratio.data.feed import lay_out
from logratio.logps import head as tiles
from logratio.logps.attention import fused, shared_prompts, varlen
from logratio.logps.attention.kernels import Choice
from logratio.logps.batch import Part, Shape, SharedBatch, TreeBatch, shape_for, to_torch
from logratio.logps.completion import score, transformer
from logratio.logps.head import Head, Transform
from logratio.logps.head_loss import head_loss, unit_gradient
from logratio.logps.router import RouterSums, balancing_loss
from logratio.training import (
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    precompute,
    update_loop,
)
from logratio.training.lora import with_lora
from logratio.training.methods.table import METHODS
from logratio.training.models import load_model
from logratio.training.optimizers import AdamSettings, clip_gradients, make_optimizer
from logratio.training.reference import (
    AdapterReference,
    FrozenReference,
    Reference,
)
from logratio.training.speed import Speedometer, Work
from logratio.training.trainer import DPOTrainer

READING = {"aten::_local_scalar_dense", "aten::equal"}
"""What reads a value."""
SIZING = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount"}
"""What makes a tensor whose size is a value."""
GPU = shape_for("shared", "cuda")


class HostWaits(TorchDispatchMode):
    """Counts them by name, and makes up what would be read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if waited := _wait(name, args, kwargs):
            self.found[waited] += 1
        if name == "aten::_local_scalar_dense" and waited:
            return 1.0
        if name == "aten::_to_copy" and waited == "to the host":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def _wait(name: str, args: Any, kwargs: Any) -> str | None:
    """Return what the host waits for in an operation, or None."""
    if name in ("aten::_to_copy", "aten::copy_"):
        return _wait_of_copy(args, kwargs)
    if not any(_is_on_gpu(x) for x in args):
        return None
    masks = [index for index in _indices(name, args) if index.dtype == torch.bool]
    repeats = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
    if name in READING | SIZING or masks or repeats:
        return f"{name} with a mask" if masks else name
    return None


def _wait_of_copy(args: Any, kwargs: Any) -> str | None:
    """A copy to the host always waits, one from the host unless it says that it need not."""
    if len(args) > 1:  # copy_
        (target, source), is_free = args[:2], kwargs.get("non_blocking", (*args, False)[2])
        before, after = source.device.type, target.device.type
    else:
        before, is_free = args[0].device.type, kwargs.get("non_blocking")
        after = torch.device(kwargs.get("device") or before).type
    if before == after:
        return None
    if after == "cpu":
        return "to the host"
    return None if is_free else "from the host"


def _indices(name: str, args: Any) -> list[Tensor]:
    given = args[1] if name.startswith("aten::index") and len(args) > 1 else ()
    return [x for x in given if isinstance(x, Tensor)] if isinstance(given, list | tuple) else []


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def test_the_counter_sees_what_waits() -> None:
    values = torch.ones(4, device="meta")
    with HostWaits() as waits:
        values.sum() + values[torch.tensor([0, 2])].mean() + torch.ones(4).sum().item()
        torch.ones(3).to("meta", non_blocking=True)
        assert not waits.found
        assert float(values.sum()) == 1.0
        assert values.cpu().tolist() == [1.0] * 4 == values.tolist()
        torch.ones(3).to("meta")
        with suppress(NotImplementedError):
            values[values > 0]
    assert waits.found == {
        "aten::_local_scalar_dense": 1,
        "to the host": 2,
        "from the host": 1,
        "aten::index with a mask": 1,
    }
    with FakeTensorMode(), HostWaits() as waits:
        assert bool(torch.empty(2, device="cuda").sum() > 0)
    assert waits.found == {"aten::_local_scalar_dense": 1}


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        usual = {"lr": 1e-3, "batch_size": 12, "token_budget": 60, "save_every": 0}
        return TrainConfig(tiny_model, [pairs_file], tmp_path / "out", **(usual | changes))

    return make


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meta device get what CUDA gets, with an attention that is any function at all."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(update_loop, "shape_for", lambda *_: GPU)
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 300)  # of some 20 tokens: several parts
    monkeypatch.setattr(fused, "choose", lambda *_: Choice("varlen", ()))
    monkeypatch.setattr(varlen, "_torch_varlen", lambda q, k, v, *_, **__: q * k.sum() * v.sum())


def reference_of(kind: str, config: TrainConfig, policy: nn.Module) -> Reference | None:
    if kind == "none":
        return None
    if kind == "frozen":
        return FrozenReference(load_model(config.model).to("meta"))
    if kind == "adapter":
        return AdapterReference(policy)
    assert config.cache is not None
    wanted = PrecomputeConfig(
        *(config.model, config.data, config.cache),
        sums_only=kind == "sums",
        mismatched=config.loss == "kto",
    )
    precompute(wanted, show_progress=False)
    return DPOTrainer(config=config, show_progress=False).cached


@pytest.mark.parametrize(
    ("loss", "kind"),
    [("dpo", "frozen"), ("dpo", "adapter"), ("dpo", "tokens"), ("ipo", "sums"), ("simpo", "none")],
)
def test_an_update_waits_once(
    config: Callable[..., TrainConfig], loss: str, kind: str, tmp_path: Path, request: Any
) -> None:
    """For its metrics and the gradients' norm together, before any weight is touched."""
    cache = tmp_path / "cache" if kind in ("tokens", "sums") else None
    run = config(loss=loss, cache=cache)
    policy = load_model(run.model)
    if kind == "adapter":
        policy = with_lora(policy, LoraSettings(rank=2), Path(run.model))
    policy = policy.to("meta")
    reference = reference_of(kind, run, policy)
    request.getfixturevalue("like_cuda")
    training = DPOTrainer(config=run, show_progress=False)
    training.begin(policy, reference, "shared")
    updates = groupby(list(training._feed(0)), lambda micro: micro.update)
    meter = Speedometer(Work.of(policy), 1e12, training.updater.device)
    with shared_prompts(transformer(policy)):
        for number, update in updates:
            with HostWaits() as waits:
                counted = meter.counted(update)
                values, groups = training.updater.update(number + 1, 1e-4, counted)
                assert meter.figures()["speed/tokens_saved"] > 0
            assert waits.found == {"to the host": 1}
            assert groups == (12, 4)[number]
            assert values["loss"] == values["grad_norm"] == 1.0


OF_UPDATE = [name for name, method in METHODS.items() if method.statistics]
"""Methods that take numbers from all groups of an update, which are computed on the host."""


@pytest.mark.parametrize("kind", ["frozen", "sums"])
@pytest.mark.parametrize("loss", OF_UPDATE)
def test_an_update_of_a_method_with_statistics_waits_twice(
    config: Callable[..., TrainConfig], loss: str, kind: str, tmp_path: Path, request: Any
) -> None:
    """For the log-probs of all its micro-batches together, then for its metrics."""
    run = config(loss=loss, cache=tmp_path / "cache" if kind == "sums" else None)
    policy = load_model(run.model).to("meta")
    reference = reference_of(kind, run, policy)
    request.getfixturevalue("like_cuda")
    training = DPOTrainer(config=run, show_progress=False)
    training.begin(policy, reference, "shared")
    updates = groupby(list(training._feed(0)), lambda micro: micro.update)
    number, update = next(updates)
    batches = list(update)
    assert len(batches) > 1
    with shared_prompts(transformer(policy)), HostWaits() as waits:
        training.updater.update(number + 1, 1e-4, iter(batches))
    assert waits.found == {"to the host": 2}


@pytest.mark.parametrize("loss", ["dpo", "bradley-terry"])
def test_an_update_of_trees_waits_once(
    config: Callable[..., TrainConfig],
    loss: str,
    like_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(update_loop, "shape_for", lambda *_: shape_for("tree", "cuda"))
    run = config(loss=loss, share_beginnings=True)
    is_scored = loss == "bradley-terry"
    policy: nn.Module = tiny_reward_model() if is_scored else load_model(run.model)
    reference = None if is_scored else FrozenReference(load_model(run.model).to("meta"))
    training = DPOTrainer(config=run, show_progress=False)
    training.begin(policy.to("meta"), reference, "tree")
    number, update = next(groupby(list(training._feed(0)), lambda micro: micro.update))
    with shared_prompts(transformer(policy)), HostWaits() as waits:
        training.updater.update(number + 1, 1e-4, update)
    assert waits.found == {"to the host": 1}


@pytest.mark.parametrize("layout", ["shared", "tree"])
def test_the_sums_of_routers_do_not_wait(layout: str) -> None:
    store = store_of(random_groups(0))
    shape = shape_for(layout, "cuda")
    batch = to_torch(lay_out(store, np.arange(len(store)), layout, **shape), "meta")
    logits = torch.ones(batch.input_ids.numel(), 8, device="meta", requires_grad=True)
    with HostWaits() as waits:
        sums = RouterSums(top_k=2)
        sums.add(batch, [logits, logits])
        loss = balancing_loss(sums, sums)
        loss.backward(unit_gradient(loss.device, loss.dtype))
    assert not waits.found
    assert logits.grad is not None


def test_a_gradient_that_is_known_to_be_one_is_not_multiplied(like_cuda: None) -> None:
    """A head's gradient is as large as the head; a value that is not known is not looked at."""
    weight, hidden = (torch.empty(n, 4, device="meta", requires_grad=True) for n in (9, 5))
    targets = torch.empty(5, dtype=torch.int64, device="meta")
    part = Part(targets, slice(0, 2), slice(0, 5))  # type: ignore[arg-type]  # of no groups
    for factor, times in ((unit_gradient(hidden.device, torch.float64), 0), (None, 2)):
        head = Head(weight, None, Transform())
        loss = head_loss(head, hidden, targets, [part], lambda logps, _: logps.double().sum())
        with Products() as products:  # type: ignore[no-untyped-call]
            loss.backward(factor)
        assert products.count == times


class Products(TorchDispatchMode):
    """Counts multiplications, element by element."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == "aten::mul"
        return func(*args, **(kwargs or {}))


def test_rows_on_cuda_are_of_few_lengths(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Shape(fields=None, multiple_of=1) == shape_for("shared", "cpu")
    assert shape_for("padded", "cuda")["multiple_of"] == 1
    run = config()
    training = DPOTrainer(config=run, show_progress=False)
    training.begin(load_model(run.model), None, "shared")
    training.updater.device = torch.device("cuda")
    monkeypatch.setattr(update_loop, "buffers_for", lambda _: None)
    widths = {micro.layout.input_ids.size for micro in training._feed(0)}
    assert widths == {128}


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(tiles, "_gpu_elements", lambda _: 2**12)
    monkeypatch.setattr(fused, "choose", lambda *_: Choice("varlen", ()))
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_scoring_on_cuda_waits_for_nothing(family: str, fake_cuda: FakeTensorMode) -> None:
    layout = lay_out(store_of(random_groups(0)), np.arange(5), **GPU)
    with fake_cuda, torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
    with fake_cuda, HostWaits() as waits, torch.no_grad():
        batch = to_torch(layout, "cuda")
        assert isinstance(batch, SharedBatch)
        sums = batch.targets.sums(score(model, batch))
    assert sums.device.type == "cuda"
    assert not waits.found


def test_scoring_a_tree_on_cuda_waits_for_nothing(fake_cuda: FakeTensorMode) -> None:
    layout = lay_out(store_of(random_groups(0)), np.arange(5), "tree", **shape_for("tree", "cuda"))
    with fake_cuda, torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=torch.bfloat16)
    with fake_cuda, HostWaits() as waits, torch.no_grad():
        batch = to_torch(layout, "cuda")
        assert isinstance(batch, TreeBatch)
        assert batch.branches is not None
        sums = batch.targets.sums(score(model, batch))
    assert sums.device.type == "cuda"
    assert not waits.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_cuda_waits_for_nothing(dtype: torch.dtype, fake_cuda: FakeTensorMode) -> None:
    with fake_cuda, HostWaits() as waits:
        weights = [nn.Parameter(torch.empty(n, 8, device="cuda", dtype=dtype)) for n in (2, 3)]
        optimizer = make_optimizer("adamw", weights, AdamSettings(1e-3))
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            clip_gradients(optimizer, 1.0)
            optimizer.step()
    assert not waits.found
