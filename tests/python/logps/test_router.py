"""The load-balancing loss equals that of transformers on the padded batch, in every layout."""

import sys
from collections import Counter
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Group
from routers import (
    COEFFICIENT,
    everything_in_float64,
    padded_forward,
    router_kinds,
    rows_of,
    small_mixture,
)
from small_configs import VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

from logratio.errors import ConfigError
from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Batch, PaddedBatch
from logratio.logps.checks import choose_layout
from logratio.logps.completion import batch_of, completion_loss, route
from logratio.logps.router import RouterSums, balancing_loss, token_weights
from logratio.training.activations import LayerOptions, layer_options

LAYOUTS = ("shared", "tree", "padded")


def groups_of(seed: int = 0) -> list[Group]:
    """One to three completions, prompts of different lengths; the last two share a beginning.

    One completion is the beginning of another, and one occurs twice.
    """
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(token) for token in random.integers(3, VOCABULARY, length)]

    begin, end = ids(9), ids(6)
    return [
        (ids(11), [ids(5), ids(9)]),
        (ids(1), [ids(4)]),
        (begin + ids(4), [end, end[:3], ids(2)]),
        (begin + ids(7), [end, end]),
    ]


@cache
def mixture(kind: str) -> Any:
    """A tiny model in float64; tests leave it as it is but for gradients."""
    return small_mixture(kind).double()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every parameter's gradient, zero where there is none, and clear them."""
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def attention(model: PreTrainedModel, layout: str) -> Any:
    return nullcontext() if layout == "padded" else shared_prompts(model)


def own_loss(model: PreTrainedModel, batch: Batch, sums: RouterSums) -> Tensor:
    """Return the negative mean log-prob of completion tokens."""
    count = len(batch.targets.target_ids)
    return completion_loss(model, batch, lambda logps, _: -logps.sum() / count, sums.add)


@pytest.mark.parametrize("kind", router_kinds())
def test_value_and_every_gradient_equal_those_of_transformers(kind: str) -> None:
    model, groups = mixture(kind), groups_of()
    best = choose_layout(small_mixture(kind))[0]
    with everything_in_float64():
        expected = padded_forward(model, groups)
        expected.loss.backward()
        exact = gradients(model)
        for layout in LAYOUTS if best == "shared" else ("padded",):
            sums = RouterSums(model.num_experts_per_tok)
            with attention(model, layout):
                own = own_loss(model, batch_of(groups, layout), sums)
            value = balancing_loss(sums, sums)
            torch.autograd.backward([own, COEFFICIENT * value])
            truth = float(expected.aux_loss.detach())
            assert float(value.detach()) == pytest.approx(truth, rel=1e-12)
            whole = float(torch.cat([g.flatten() for g in exact.values()]).norm())
            for name, gradient in gradients(model).items():
                assert float((gradient - exact[name]).norm()) <= 1e-12 * whole, (layout, name)


def test_a_block_of_sparse_attention_counts_tokens_as_if_each_row_were_alone() -> None:
    """Where transformers' padded batch is NaN, its loss of unpadded rows is the truth."""
    model, groups = mixture("minimax_m3_vl_text"), groups_of()
    rows = [torch.tensor([prompt + ids]) for prompt, ids in rows_of(groups)]
    sums = RouterSums(model.num_experts_per_tok)
    loss_of: Any = vars(sys.modules[type(model).__module__])["load_balancing_loss_func"]
    with everything_in_float64(), torch.no_grad():
        each = [model(ids, output_router_logits=True).router_logits for ids in rows]
        layers = tuple(torch.cat(layer) for layer in zip(*each, strict=True))
        route(model, batch_of(groups, "padded"), sums.add)
        truth = loss_of(layers, model.num_experts, model.num_experts_per_tok)
    assert float(balancing_loss(sums, sums)) == pytest.approx(float(truth), rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shares_of_parts_add_up_to_the_loss_of_all(layout: str) -> None:
    """Values and gradients, however groups are divided into micro-batches."""
    model, groups = mixture("mixtral"), groups_of()
    found = []
    for cuts in ([0, 4], [0, 1, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]):
        parts = [batch_of(groups[start:stop], layout) for start, stop in pairwise(cuts)]
        whole, value = RouterSums(2), torch.zeros((), dtype=torch.float64)
        with everything_in_float64(), attention(model, layout):
            for part in parts:
                route(model, part, whole.add)
            for part in parts:
                sums = RouterSums(2)
                own_loss(model, part, sums)
                share = balancing_loss(sums, whole)
                share.backward()
                value += share.detach()
        found.append((value, torch.cat([g.flatten() for g in gradients(model).values()])))
    value, gradient = found[0]
    assert float(gradient.norm()) > 1e-3
    for other, slope in found[1:]:
        assert float(abs(other - value)) <= 1e-12
        assert float((slope - gradient).norm()) <= 1e-12 * float(gradient.norm())


def test_one_micro_batch_alone_would_give_another_loss() -> None:
    """Why the counts must be those of the whole update."""
    model, groups = mixture("mixtral"), groups_of()
    each = []
    for part in ([groups[0]], groups[1:], groups):
        sums = RouterSums(2)
        route(model, batch_of(part, "padded"), sums.add)
        each.append((float(balancing_loss(sums, sums)), float(sums.tokens)))
    (first, some), (second, others), (whole, count) = each
    assert some + others == count
    assert abs((first * some + second * others) / count - whole) > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_each_token_counts_once_for_each_completion(layout: str, seed: int) -> None:
    groups = groups_of(seed)
    batch = batch_of(groups, layout)
    weights, rows = token_weights(batch), rows_of(groups)
    assert float(weights.sum()) == sum(len(prompt) + len(ids) for prompt, ids in rows)
    wanted = Counter(token for prompt, ids in rows for token in prompt + ids)
    found: Counter[int] = Counter()
    for token, weight in zip(batch.input_ids.flatten().tolist(), weights.tolist(), strict=True):
        found[token] += int(weight)
    assert +found == wanted
    if isinstance(batch, PaddedBatch):
        assert torch.equal(weights.view_as(batch.input_ids), batch.attention_mask.double())


def test_padding_at_the_end_of_a_shared_row_does_not_count() -> None:
    from logratio._rust import StoreWriter
    from logratio.data.feed import lay_out
    from logratio.logps.batch import to_torch

    writer = StoreWriter()
    for number, (prompt, completions) in enumerate(groups_of()):
        flat = np.array([i for ids in completions for i in ids], np.int32)
        lengths = np.array([len(ids) for ids in completions], np.uint32)
        roles = np.full(len(lengths), 2, np.uint8)
        counted = np.ones(len(flat), np.uint8)
        writer.push(np.array(prompt, np.int32), flat, counted, lengths, roles, 0, number)
    batch = to_torch(lay_out(writer.finish(), np.arange(4), "shared", multiple_of=128))
    weights = token_weights(batch)
    assert len(weights) % 128 == 0
    tokens = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in groups_of())
    assert bool((weights[:tokens] > 0).all())
    assert not bool(weights[tokens:].any())


@pytest.mark.parametrize(
    "kept", [LayerOptions(1), LayerOptions(2), LayerOptions(2, offload=True)], ids=str
)
def test_checkpointed_and_offloaded_layers_give_the_same_bits(
    kept: LayerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logratio.training.activations.WORTH_MOVING", 0)
    model, batch = mixture("mixtral"), batch_of(groups_of(), "shared")
    found = []
    for options in (LayerOptions(), kept):
        sums = RouterSums(2)
        with shared_prompts(model), layer_options(model, options):
            own = own_loss(model, batch, sums)
            torch.autograd.backward([own, balancing_loss(sums, sums)])
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any("gate" in name and bool(found[0][name].any()) for name in found[0])


def test_sums_stay_exact_in_low_precision() -> None:
    """Counts are whole numbers, and probabilities are at least float32, under autocast too."""
    model, batch = mixture("qwen3_moe"), batch_of(groups_of(), "padded")
    sums = RouterSums(2)
    logits: list[Tensor] = []

    def keep(batch: Batch, given: tuple[Tensor, ...] | None) -> None:
        assert given
        logits.extend(layer.to(torch.bfloat16) for layer in given)
        sums.add(batch, logits)

    with torch.autocast("cpu", torch.bfloat16):
        route(model, batch, keep)
    assert isinstance(sums.counts, Tensor)
    assert isinstance(sums.probabilities, Tensor)
    assert float(sums.counts.sum()) == 2 * float(sums.tokens)
    assert float(sums.probabilities.sum()) == pytest.approx(float(sums.tokens), rel=1e-6)


def test_a_model_without_experts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="set router_aux_loss_coef to 0"):
        RouterSums(2).add(batch_of(groups_of(), "padded"), ())
