"""One log-prob function: shared = padded = the fp64 oracle, and no completion sees another."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_oracle import store_of
from oracle import in_float64, per_token_logps
from random_groups import token_groups
from tiny_models import FAMILIES, VOCABULARY, mamba_config, tiny
from torch import Tensor

from logratio.data.feed import lay_out
from logratio.logps import checks, completion
from logratio.logps.attention import SharedPromptError, shared_prompts
from logratio.logps.batch import Batch, Shape, SharedBatch, to_torch
from logratio.logps.checks import (
    UnsupportedModelError,
    batch_of,
    check_head,
    check_tree,
    choose_layout,
)
from logratio.logps.completion import score
from logratio.training import TrainConfig, completion_logps
from logratio.training.methods.columns import averages
from logratio.training.methods.group_data import GroupData
from logratio.training.methods.objective import Objective
from logratio.training.reference import PerToken

LAYOUTS = ("shared", "padded")


def weights(count: int) -> Tensor:
    return torch.linspace(-1, 1, count, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_equal_the_oracle_in_values_and_gradients(family: str) -> None:
    model, groups = tiny(FAMILIES[family]()), token_groups()
    double = in_float64(model)
    expected = per_token_logps(double, groups)
    (weights(len(expected)) * expected).sum().backward()
    truth = torch.cat([p.grad.flatten() for p in double.parameters() if p.grad is not None])
    for layout in LAYOUTS:
        model.zero_grad()
        logps = score(model, batch_of(groups, layout))
        assert logps.dtype == torch.float32
        assert float((logps.double() - expected).detach().abs().max()) <= 1e-5
        (weights(len(logps)) * logps).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert float((gradient.double() - truth).norm() / truth.norm()) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_of_a_group_do_not_see_each_other(family: str) -> None:
    model = tiny(FAMILIES[family]())
    (prompt, (first, second)), *rest = token_groups(seed=3)
    other = [(token + 1) % VOCABULARY for token in second]
    with torch.no_grad():
        before = score(model, batch_of([(prompt, [first, second]), *rest], "shared"))
        after = score(model, batch_of([(prompt, [first, other]), *rest], "shared"))
    kept = slice(0, len(first))
    moved = slice(len(first), len(first) + len(second))
    beyond = slice(len(first) + len(second), None)
    assert torch.equal(before[kept], after[kept])
    assert torch.equal(before[beyond], after[beyond])
    assert not torch.equal(before[moved], after[moved])


@pytest.mark.parametrize("completions", [1, 3, 8])
def test_groups_of_any_size(completions: int) -> None:
    model, groups = tiny(FAMILIES["llama"]()), token_groups(1, completions)
    with torch.no_grad():
        expected = per_token_logps(in_float64(model), groups)
        for layout in LAYOUTS:
            logps = score(model, batch_of(groups, layout)).double()
            assert torch.allclose(logps, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_leak_check(family: str) -> None:
    assert choose_layout(tiny(FAMILIES[family]())) == ("shared", "leak check passed")


def test_a_model_with_a_running_state_gets_the_padded_layout() -> None:
    model = tiny(mamba_config(), scale=1.0)
    layout, reason = choose_layout(model)
    assert layout == "padded"
    assert "Mamba" in reason
    groups = token_groups(2)
    with torch.no_grad():
        expected = per_token_logps(in_float64(model), groups)
        logps = score(model, batch_of(groups, "padded"))
    assert torch.allclose(logps.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_leaks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from logratio.logps.attention import plan

    def without_owners(positions: Tensor, _: Tensor, window: int | None, start: int = 0) -> Tensor:
        return unseen(positions, torch.zeros_like(positions), window, start)

    unseen = plan.hidden_keys
    monkeypatch.setattr(plan, "hidden_keys", without_owners)
    layout, reason = choose_layout(tiny(FAMILIES["llama"]()))
    assert layout == "padded"
    assert "see each other" in reason


@pytest.mark.parametrize("layout", ["shared", "tree"])
def test_a_leak_below_the_rounding_of_bfloat16_is_found(layout: str) -> None:
    """It has no gradient either: only that equal calls give equal bits shows it."""
    model: Any = tiny(FAMILIES["llama"]()).bfloat16()
    layer, check = model.model.layers[-1], checks._tree_leak if layout == "tree" else checks._leak
    plain, strength = layer.forward, 0.0

    def leaking(hidden: Tensor, *given: Any, **named: Any) -> Tensor:
        if "shared_prompt" in named:  # every token sees the mean of the row
            hidden = hidden + strength * hidden.detach().mean(1, keepdim=True)
        return plain(hidden, *given, **named)  # type: ignore[no-any-return]

    layer.forward = leaking
    groups = checks._probe_tree(model) if layout == "tree" else checks._probe(model, seed=0)

    def moved() -> float:
        logps = checks._scores(model, groups, layout)
        return max(check(model, groups, logps, changed) for changed in (0, 1))

    assert moved() == 0
    assert choose_layout(model, share_beginnings=True)[0] == "tree"
    strength = 0.01
    assert 0 < moved() < checks.SAME_CALLS[torch.bfloat16]
    reason = check_tree(model) if layout == "tree" else choose_layout(model)[1]
    assert reason is not None and re.search(r"see each other \(.* nats\)", reason)


def test_an_unknown_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(FAMILIES["llama"]())
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda _: torch.nn.Identity())
    with pytest.raises(UnsupportedModelError, match="its head is not supported"):
        check_head(model)


def test_logits_that_are_not_finite_are_refused() -> None:
    """A NaN is not above a bound either."""
    model = tiny(FAMILIES["llama"]())
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
        model.get_output_embeddings().weight[3, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="not finite"):
        choose_layout(model)


@pytest.mark.parametrize(
    ("asks", "sentence"),
    [
        ({"position_bias": torch.zeros(1)}, "takes position_bias, which shared-prompt attention"),
        ({"block_indices": torch.zeros(1)}, "takes block_indices, which shared-prompt attention"),
        ({"sliding_window": 5}, "its mask is None, of its attention 5"),
        ({"attention_mask": torch.empty(5, 1, 1, 0)}, "its mask is 5, of its attention None"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "builds its attention masks itself"),
        ({"shared_prompt": None}, "does not pass keyword arguments"),
    ],
)
def test_unsupported_attention_options_are_refused(asks: dict[str, Any], sentence: str) -> None:
    from logratio.logps.attention import SharedPrompt
    from logratio.logps.attention.interface import shared_prompt_attention

    batch = batch_of(token_groups(), "shared")
    heads = torch.zeros(1, 2, batch.input_ids.shape[1], 4)
    assert isinstance(batch, SharedBatch)
    asked = {"attention_mask": None, "shared_prompt": SharedPrompt(batch), **asks}
    with pytest.raises(SharedPromptError, match=sentence):
        shared_prompt_attention(torch.nn.Identity(), heads, heads, heads, **asked)


def test_the_models_own_attention_comes_back() -> None:
    model = tiny(FAMILIES["llama"]())
    before = model.config._attn_implementation
    with shared_prompts(model), shared_prompts(model):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_a_shared_batch_without_shared_attention_is_an_error() -> None:
    model, batch = tiny(FAMILIES["llama"]()), batch_of(token_groups(), "shared")
    with pytest.raises(SharedPromptError, match="inside shared_prompts"):
        completion_logps(model, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_a_row_changes_no_result(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where rows have multiples of 128 tokens."""
    model, groups, found = tiny(FAMILIES[family]()), token_groups(), []
    for step in (1, 128):
        monkeypatch.setattr(
            completion, "shape_for", lambda *_, n=step: Shape(fields=None, multiple_of=n)
        )
        batch = batch_of(groups, "shared")
        assert isinstance(batch, SharedBatch)
        assert (batch.input_ids.shape[1] % 128 == 0) == (step == 128)
        model.zero_grad()
        logps = score(model, batch)
        (weights(len(logps)) * logps).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logps.detach(), gradient))
    (logps, gradient), (filled_logps, filled_gradient) = found
    assert torch.allclose(logps, filled_logps, rtol=0, atol=1e-5)
    assert float((gradient - filled_gradient).norm() / gradient.norm()) <= 1e-5


def test_sums_exclude_tokens_that_do_not_count() -> None:
    store = store_of([([1, 2], [([3, 4, 5], [0, 1, 1], 0), ([6], [1], 1)])])
    targets = to_torch(lay_out(store, np.array([0]))).targets
    per_token = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    assert targets.sums(per_token).tolist() == [-6.0, -8.0]
    assert targets.host_sums(per_token.numpy()).tolist() == [-6.0, -8.0]
    assert targets.lengths.tolist() == [2.0, 1.0]


def long_batch(tokens: int = 40_000) -> tuple[Batch, Tensor]:
    """A pair whose completions are long, and its log-probs, of which every fifth is large."""
    random = np.random.default_rng(0)
    ids = [random.integers(1, VOCABULARY, length).tolist() for length in (tokens, tokens - 999)]
    logps = -random.exponential(1.5, 2 * tokens - 999) - 9.0 * (
        np.arange(2 * tokens - 999) % 5 == 0
    )
    batch = batch_of([([1, 2], ids)], "padded")
    return batch, torch.from_numpy(logps.astype(np.float32))


def test_sums_of_long_completions_lose_no_digits() -> None:
    batch, logps = long_batch()
    sums = batch.targets.sums(logps.requires_grad_())
    exact = [math.fsum(part) for part in logps.detach().double().split([40_000, 39_001])]
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx(exact, rel=1e-14)
    assert batch.targets.host_sums(logps.detach().numpy()).tolist() == sums.tolist()
    (sums * torch.tensor([1.0, -2.0])).sum().backward()
    assert logps.grad is not None
    assert logps.grad.dtype == torch.float32
    assert torch.equal(logps.grad[[0, 39_999, 40_000, -1]], torch.tensor([1.0, 1.0, -2.0, -2.0]))
    assert batch.targets.lengths.tolist() == [40_000, 39_001]


class Given(PerToken):
    """A reference that repeats given log-probs."""

    def __init__(self, known: Tensor) -> None:
        self.known = known

    def logps(self, batch: Batch) -> Tensor:
        return self.known


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_losses_and_metrics_of_long_completions_lose_no_digits(loss: str, tmp_path: Path) -> None:
    """Policy and reference differ in the last digits of tokens, which float32 sums swallow."""
    batch, logps = long_batch()
    policy = logps * (1 + 1e-6 * torch.linspace(-1, 1, len(logps)))
    config = TrainConfig(tmp_path, [], tmp_path, loss=loss, beta=(beta := 0.5))
    objective = Objective.of(config)
    sums = batch.targets.sums(policy), Given(logps).sums(batch)
    groups = GroupData(None, None, objective.needs_reference).groups(batch.targets, *sums)
    losses = objective.losses(groups)
    columns = objective.columns(losses, groups)
    parts = [
        [math.fsum(part) for part in of.double().split([40_000, 39_001])] for of in (policy, logps)
    ]
    (chosen, rejected), (was_chosen, was_rejected) = parts
    margin = beta * ((chosen - was_chosen) - (rejected - was_rejected))
    expected = {
        "dpo": math.log1p(math.exp(-margin)),
        "ipo": ((chosen - was_chosen) / 40_000 - (rejected - was_rejected) / 39_001 - 1) ** 2,
        "simpo": math.log1p(math.exp(1 - beta * (chosen / 40_000 - rejected / 39_001))),
    }[loss]
    assert float(losses[0]) == pytest.approx(expected, rel=1e-9)
    assert averages(columns)[0]["logps/chosen"] == pytest.approx(chosen, rel=1e-14)
    assert all(isinstance(one, Tensor) and one.dtype == torch.float64 for one in columns.values())
