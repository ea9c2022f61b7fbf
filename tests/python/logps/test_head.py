"""The head in tiles: values and gradients equal float64, whatever the tiles and the family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Group, in_float64, per_token_logps
from random_groups import token_groups
from tiny_models import FAMILIES, GROUPED, VOCABULARY, tiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from logratio.logps import head as tiles
from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Batch, Part
from logratio.logps.checks import batch_of, check_head
from logratio.logps.completion import completion_logps, completion_loss, score
from logratio.logps.head import Head, Tile, Transform
from logratio.logps.head_loss import head_logps
from logratio.training.models import quietly

HEADS: dict[str, Callable[[], PreTrainedConfig]] = {
    "plain": FAMILIES["llama"],
    "tied": FAMILIES["gpt2"],
    "capped": lambda: Gemma2Config(
        **GROUPED, query_pre_attn_scalar=8, final_logit_softcapping=5.0, sliding_window=64
    ),
    "scaled": lambda: CohereConfig(**GROUPED, logit_scale=0.4),
    "divided": lambda: GraniteConfig(**GROUPED, logits_scaling=3.0),
    "biased": lambda: GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=512
    ),
}
TILE_SIZES = (1, 7, 10**6)


def with_bias(model: PreTrainedModel) -> PreTrainedModel:
    """A bias of zeros would show nothing."""
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


def dpo(logps: Tensor, part: Part) -> Tensor:
    sums = part.targets.sums(logps)
    return -logsigmoid(0.1 * (sums[0::2] - sums[1::2])).sum()


def gradients(model: nn.Module) -> Tensor:
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return torch.cat(found)


def oracle_loss(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    sums, logps = [], per_token_logps(model, groups)
    for length in (len(completion) for _, completions in groups for completion in completions):
        sums.append(logps[:length].sum())
        logps = logps[length:]
    return -logsigmoid(0.1 * (torch.stack(sums[0::2]) - torch.stack(sums[1::2]))).sum()


def set_tile(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", positions * VOCABULARY)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


@pytest.mark.parametrize("positions", TILE_SIZES)
@pytest.mark.parametrize("name", HEADS)
def test_log_probs_and_gradients_equal_float64(
    name: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_tile(monkeypatch, positions)
    model, groups = with_bias(tiny(HEADS[name]())), token_groups()
    double = in_float64(model)
    expected = per_token_logps(double, groups)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    logps = score(model, batch_of(groups, "padded"))
    assert logps.dtype == torch.float32
    assert float((logps.double() - expected).detach().abs().max()) <= 1e-5
    (weights * logps).sum().backward()
    assert distance(gradients(model), gradients(double)) <= 1e-5


@pytest.mark.parametrize("positions", [*TILE_SIZES, 40])
@pytest.mark.parametrize("name", HEADS)
def test_a_loss_made_tile_by_tile_equals_float64(
    name: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of one position split every group; 40 hold some groups and split others."""
    set_tile(monkeypatch, positions)
    model, groups = with_bias(tiny(HEADS[name]())), token_groups(5)
    double = in_float64(model)
    expected = oracle_loss(double, groups)
    expected.backward()
    loss = completion_loss(model, batch_of(groups, "padded"), dpo)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert distance(gradients(model), gradients(double)) <= 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_padded_rows_give_the_same_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where rows of a tile begin at multiples of 16 bytes."""
    set_tile(monkeypatch, 40)
    model, batch = with_bias(tiny(HEADS[name]())), batch_of(token_groups(5), "padded")
    completion_loss(model, batch, dpo).backward()
    expected = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(tiles, "ALIGNED", {"cpu": VOCABULARY - 1})
    completion_loss(model, batch, dpo).backward()
    assert distance(gradients(model), expected) <= 1e-6


def test_rows_on_cuda_are_aligned() -> None:
    """On fake tensors: 50,257 bfloat16 would begin at odd places."""
    with FakeTensorMode():
        weight = torch.empty(50_257, 64, device="cuda", dtype=torch.bfloat16)
        hidden = torch.empty(16, 64, device="cuda", dtype=torch.bfloat16)
        targets = torch.zeros(16, dtype=torch.int64, device="cuda")
        with Tile(Head(weight, None, Transform()), hidden, targets) as tile:
            assert tile._slopes.shape == (16, 50_257)
            assert tile._slopes.stride() == (50_264, 1)


@pytest.mark.parametrize(
    ("gib", "elements"),
    [(0.5, 2**26), (23, 2**26), (40, 2**27), (79, 2**28), (124, 2**28), (139, 2**29), (999, 2**29)],
)
def test_a_gpu_s_tile_follows_its_free_memory(gib: float, elements: int) -> None:
    assert tiles.elements_for(gib * 2**30) == elements
    assert tiles.BYTES * elements <= max(2**29, gib * 2**30 / 32)


def test_a_factor_on_the_loss_reaches_the_gradients() -> None:
    model, batch = tiny(FAMILIES["llama"]()), batch_of(token_groups(), "padded")
    completion_loss(model, batch, dpo).backward()
    once = gradients(model)
    model.zero_grad()
    (3 * completion_loss(model, batch, dpo)).backward()
    assert distance(gradients(model), 3 * once) <= 1e-6


@pytest.mark.parametrize("positions", TILE_SIZES)
def test_a_frozen_head_passes_gradients_on(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under LoRA: the body is trained, the head has no gradient."""
    set_tile(monkeypatch, positions)
    model, batch = tiny(HEADS["capped"]()), batch_of(token_groups(), "padded")
    expected = logps_gradient(model, batch, frozen=False)
    found = logps_gradient(model, batch, frozen=True)
    assert distance(found, expected) <= 1e-6
    assert model.get_output_embeddings().weight.grad is None
    model.zero_grad()
    completion_loss(model, batch, lambda logps, part: logps.square().sum()).backward()
    assert model.get_output_embeddings().weight.grad is None
    assert distance(body_gradient(model), expected) <= 1e-6


def logps_gradient(model: PreTrainedModel, batch: Batch, *, frozen: bool) -> Tensor:
    for parameter in (*model.get_input_embeddings().parameters(),):
        parameter.requires_grad_(not frozen)  # tied to the head
    model.get_output_embeddings().requires_grad_(not frozen)
    model.zero_grad()
    completion_logps(model, batch).square().sum().backward()
    return body_gradient(model)


def body_gradient(model: PreTrainedModel) -> Tensor:
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    return gradients(layers)


def test_a_loss_may_score_something_itself() -> None:
    """The tile is in use meanwhile, and must not be written over."""
    model, batch = tiny(FAMILIES["llama"]()), batch_of(token_groups(), "padded")
    other = batch_of(token_groups(9), "padded")
    expected = completion_loss(model, batch, dpo)
    expected.backward()
    before = gradients(model)
    model.zero_grad()

    def scoring(logps: Tensor, part: Part) -> Tensor:
        with torch.no_grad():
            completion_logps(model, other)
        return dpo(logps, part)

    completion_loss(model, batch, scoring).backward()
    assert torch.equal(gradients(model), before)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tile(monkeypatch, 16)
    model, batch = tiny(FAMILIES["llama"]()), batch_of(token_groups(), "shared")
    tokens, largest = len(batch.targets.target_ids), Largest()  # type: ignore[no-untyped-call]
    assert tokens > 64
    with largest, shared_prompts(model):
        completion_logps(model, batch).sum().backward()
        completion_loss(model, batch, dpo).backward()
    parameters = max(p.numel() for p in model.parameters())
    assert largest.elements <= max(parameters, 16 * VOCABULARY, 64 * batch.input_ids.shape[1])
    assert largest.elements < tokens * VOCABULARY


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else (result,)
        sizes = [x.numel() for x in made if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_extreme_logits_neither_overflow_nor_underflow() -> None:
    head = Head(torch.eye(3) * 300, None, Transform())
    hidden = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -1.0]])
    logps = head_logps(head, hidden, torch.tensor([1, 2]))
    assert logps.tolist() == pytest.approx([-600.0, -600.0 - 0.6931472])


def test_no_targets_are_no_log_probs() -> None:
    head = Head(torch.eye(3), None, Transform())
    assert head_logps(head, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_known(name: str) -> None:
    check_head(with_bias(tiny(HEADS[name]())))


def test_a_head_with_an_adapter_is_applied_as_a_module() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny(FAMILIES["llama"]())
    with quietly():
        wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"], r=2))
    assert Head.of(model) is None
    groups = token_groups()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    expected = per_token_logps(in_float64(model), groups)
    assert torch.allclose(score(wrapped, batch_of(groups, "padded")).double(), expected, atol=1e-4)
    completion_loss(wrapped, batch_of(groups, "padded"), dpo).backward()
    wanted = [p.grad for name, p in wrapped.named_parameters() if "lora" in name]
    assert all(gradient is not None for gradient in wanted)


def test_under_autocast_sums_stay_close_and_wide() -> None:
    model, batch = tiny(HEADS["capped"](), scale=2.0), batch_of(token_groups(), "padded")
    with torch.no_grad():
        expected = completion_logps(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = completion_logps(model, batch)
        loss = completion_loss(model, batch, dpo)
    assert (logps.dtype, loss.dtype) == (torch.float32, torch.float64)
    assert float((logps - expected).detach().abs().max()) <= 0.1
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("limit", [1, 25, 60, 10**6])
def test_parts_are_whole_groups_in_order(limit: int) -> None:
    targets = batch_of(token_groups(completions=3), "shared").targets
    parts = targets.parts(limit)
    ids = torch.cat([part.targets.target_ids for part in parts])
    assert torch.equal(ids, targets.target_ids)
    assert [g for part in parts for g in part.targets.groups] == targets.groups.tolist()
    logps = torch.linspace(-1, 0, len(ids))
    sums = [part.targets.sums(logps[part.targets_at]) for part in parts]
    assert torch.allclose(torch.cat(sums), targets.sums(logps))
    assert all(len(part.targets.groups) == 1 for part in parts if len(part.targets.rows) > limit)
    for part in parts:
        size = part.targets_at.stop - part.targets_at.start
        assert size <= limit or len(part.targets.groups) == 1


def test_on_cuda_the_head_s_gradient_goes_straight_into_its_float32_sum() -> None:
    """On fake tensors: no product in bfloat16 is made first, rounded and then added."""
    with FakeTensorMode():
        weight = torch.empty(512, 64, device="cuda", dtype=torch.bfloat16)
        hidden = torch.empty(16, 64, device="cuda", dtype=torch.bfloat16)
        total = torch.empty(512, 64, device="cuda")
        targets = torch.zeros(16, dtype=torch.int64, device="cuda")
        with Tile(Head(weight, None, Transform()), hidden, targets) as tile:
            tile._slopes  # noqa: B018
            with _Called() as called:
                tile.add_head_gradient(torch.empty(16, device="cuda"), total, None)
    assert called.names.count("aten::addmm") == 1
    assert "aten::mm" not in called.names
    assert "aten::add_" not in called.names


class _Called(TorchDispatchMode):
    """Records the name of each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))
