"""A completion's log-probs do not depend on its batch, for any model."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import GROUPED, VOCABULARY
from oracle import Group, in_float64
from rope_configs import FIELDS, ORIGINAL, ROPES, config_of
from tiny_models import tiny, word_tokenizer
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from logratio.errors import ConfigError
from logratio.logps.checks import choose_layout
from logratio.logps.completion import (
    batch_of,
    completion_loss,
    groups_of,
    limits_of,
    score,
    split_by_limits,
)
from logratio.training import EvaluateConfig
from logratio.training.evaluation import prepare

LAYOUTS = ("shared", "padded")

DSA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "head_dim": None,
}
TOP_K: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-V3.2": ("deepseek_v32", DSA),
    "GLM with sparse attention": ("glm_moe_dsa", DSA),
    "Doge": ("doge", {"keep_window_size": 16}),
}
FIELDS |= TOP_K
CASES = [(name, layout) for name in ROPES for layout in LAYOUTS]
CASES += [(name, "padded") for name in TOP_K]


@cache
def model_of(name: str) -> PreTrainedModel:
    return tiny(config_of(name), scale=4.0)


def mixed_groups(seed: int = 0) -> list[Group]:
    """One to five completions; siblings on both sides of the limit, and exactly at it."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(token) for token in random.integers(3, VOCABULARY, length)]

    shapes = [(20, [10, 90, 44, 45]), (80, [5, 9]), (4, [6]), (60, [3, 5, 4, 4, 25])]
    return [(ids(prompt), [ids(length) for length in lengths]) for prompt, lengths in shapes]


def alone(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Score each completion on its own in float64, by a model that saw nothing long before."""
    scored = []
    for prompt, completions in groups:
        for completion in completions:
            model(input_ids=torch.tensor([[1]]), use_cache=False)  # dynamic factors begin anew
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
            logps = torch.log_softmax(logits[0, len(prompt) - 1 : -1], -1)
            scored.append(logps.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(scored)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_values_and_gradients_are_those_of_each_sequence_alone(
    name: str, layout: str, seed: int
) -> None:
    model, groups = model_of(name), mixed_groups(seed)
    double = in_float64(model)
    expected = alone(double, groups)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    truth = torch.cat([p.grad.flatten() for p in double.parameters() if p.grad is not None])
    model.zero_grad()
    batch = batch_of(groups, layout)
    logps = score(model, batch)
    assert float((logps.double() - expected).detach().abs().max()) <= 2e-5
    (weights * logps).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float((gradient.double() - truth).norm() / truth.norm()) <= 1e-5


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_neither_siblings_nor_order_move_a_completion(name: str, layout: str) -> None:
    model, groups = model_of(name), mixed_groups()
    with torch.no_grad():
        together = score(model, batch_of(groups, layout))
        turned = score(model, batch_of(groups[::-1], layout))
        apiece = torch.cat(
            [
                score(model, batch_of([(prompt, [ids])], layout))
                for prompt, completions in groups
                for ids in completions
            ]
        )
    sizes = [sum(map(len, completions)) for _, completions in groups]
    back = torch.cat(turned.split(sizes[::-1])[::-1])
    assert float((together - apiece).abs().max()) <= 1e-5
    assert float((together - back).abs().max()) <= 1e-5


@pytest.mark.parametrize("name", ROPES)
def test_batching_without_limits_would_matter(name: str) -> None:
    """Otherwise the tests above could not fail: a plain padded batch moves the logits."""
    model, groups = model_of(name), mixed_groups()
    (short,), prompt = groups[2][1], groups[2][0]
    rows = [prompt + short, groups[1][0] + groups[1][1][0]]
    ids = torch.tensor([row + [0] * (len(rows[1]) - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (len(rows[1]) - len(row)) for row in rows])
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        model(input_ids=torch.tensor([[1]]), use_cache=False)
        apiece = model(input_ids=ids[:1, : len(rows[0])], use_cache=False).logits
    assert float((together[0, : len(rows[0])] - apiece[0]).abs().max()) > 0.05


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_of_pairs_is_that_of_the_pairs_alone(layout: str) -> None:
    model, groups = (
        model_of("phi3"),
        [mixed_groups()[1], (mixed_groups()[0][0], mixed_groups()[0][1][:2])],
    )

    def loss_of(logps: Tensor, part: Any) -> Tensor:
        chosen, rejected = part.targets.sums(logps).view(-1, 2).unbind(1)
        return -torch.nn.functional.logsigmoid(0.01 * (chosen - rejected)).sum()

    with torch.no_grad():
        expected = alone(in_float64(model), groups)
    batch = batch_of(groups, layout)
    sums = batch.targets.sums(expected)
    margins = sums.view(-1, 2)[:, 0] - sums.view(-1, 2)[:, 1]
    truth = float(-torch.nn.functional.logsigmoid(0.01 * margins).sum())
    loss = completion_loss_in(model, batch, loss_of).detach()
    assert float(loss) == pytest.approx(truth, abs=1e-6)


def completion_loss_in(model: PreTrainedModel, batch: Any, loss_of: Any) -> Tensor:
    from logratio.logps.attention import shared_prompts

    with shared_prompts(model) if hasattr(batch, "prompt_lengths") else torch.no_grad():
        return completion_loss(model, batch, loss_of)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_cut_only_where_it_must_be(layout: str) -> None:
    plain, longrope = (
        limits_of(AutoConfig.for_model("llama", **GROUPED)),
        limits_of(config_of("phi3")),
    )
    dynamic = limits_of(config_of("llama with dynamic NTK"))
    batch, short = batch_of(mixed_groups(), layout), batch_of(mixed_groups()[2:3], layout)
    assert plain == ()
    assert [len(split_by_limits(batch, limits)) for limits in (plain, longrope, dynamic)] == [
        1,
        2,
        5,
    ]
    assert [split_by_limits(short, limits)[0].batch is short for limits in (longrope, dynamic)] == [
        True,
        True,
    ]
    every = np.concatenate([call.targets_at for call in split_by_limits(batch, dynamic)])
    assert sorted(every.tolist()) == list(range(len(batch.targets.target_ids)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batchs_groups_are_read_back(layout: str) -> None:
    assert groups_of(batch_of(mixed_groups(), layout)) == mixed_groups()


@pytest.mark.parametrize("name", TOP_K)
def test_top_k_models_are_scored_one_length_at_a_time_and_say_why(name: str) -> None:
    layout, reason = choose_layout(model_of(name))
    assert layout == "padded"
    assert "has top-k attention" in reason
    assert "sequences longer than 16 tokens are batched by equal length" in reason


@pytest.mark.parametrize("name", ROPES)
def test_such_models_share_prompts(name: str) -> None:
    assert choose_layout(model_of(name)) == ("shared", "leak check passed")


def test_samples_that_would_cross_the_limit_are_refused(tmp_path: Path, pairs_file: Path) -> None:
    tokenizer = word_tokenizer()
    config = AutoConfig.for_model(
        "phi3", **{**GROUPED, **FIELDS["phi3"][1], "vocab_size": len(tokenizer)}
    )
    tiny(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = EvaluateConfig(
        policy=tmp_path,
        reference=tmp_path,
        data=[pairs_file],
        beta=0.1,
        samples=2,
        max_new_tokens=ORIGINAL,
    )
    with pytest.raises(ConfigError, match=r"LongRoPE.*beyond 64 tokens.*draw no samples"):
        prepare(settings, show_progress=False)
