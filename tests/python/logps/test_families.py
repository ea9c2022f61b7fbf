"""Every model family: log-probs and all gradients equal the fp64 oracle, and nothing leaks."""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, MIXTURES, SCALED_HEADS, UNKNOWN_HEADS, VOCABULARY, WINDOW
from gpu_families import FAMILIES as ON_GPU
from oracle import Group, in_float64, per_token_logps
from tiny_models import tiny
from torch import Tensor
from transformers import Gemma2PreTrainedModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from logratio.logps import checks
from logratio.logps.attention import plan as calls
from logratio.logps.batch import SharedBatch
from logratio.logps.checks import (
    UnsupportedModelError,
    _crosstalk,
    batch_of,
    check_head,
    choose_layout,
)
from logratio.logps.completion import score
from logratio.training.config import Precision
from logratio.training.models import autocast, load_model, with_softcap

SHARED = [name for name, family in FAMILIES.items() if family.layout == "shared"]
LAYOUTS = [
    (name, layout)
    for name, family in FAMILIES.items()
    for layout in ("shared", "padded")
    if layout in (family.layout, "padded")
]
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.families) for seed in (1, 2))]
"""The first in `make test`, the others in `make families`."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "bf16-weights")


def ragged_groups(seed: int = 0) -> list[Group]:
    """One to five completions, prompts and completions of one token, some beyond the window."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return [int(token) for token in random.integers(3, VOCABULARY, length)]

    shapes = [(14, [11, 6]), (1, [5]), (21, [1, 13, 4]), (13, [2, 12, 1, 3, 1])]
    shapes += [(3 * WINDOW, [2 * WINDOW, 1, 4, 2])]
    return [(ids(prompt), [ids(length) for length in lengths]) for prompt, lengths in shapes]


@cache
def model_of(family: str) -> PreTrainedModel:
    """A tiny model; tests leave it as it is but for gradients."""
    return tiny(FAMILIES[family].config(), scale=FAMILIES[family].scale)


def weighted(logps: Tensor) -> Tensor:
    return (torch.linspace(-1, 1, len(logps), dtype=torch.float64) * logps).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter's gradient, zero where there is none."""
    return {
        name: torch.zeros_like(p).double() if p.grad is None else p.grad.double()
        for name, p in model.named_parameters()
    }


@cache
def truth(family: str, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients, in float64, one sequence at a time."""
    double = in_float64(model_of(family))
    expected = per_token_logps(double, ragged_groups(seed))
    weighted(expected).backward()
    return expected.detach(), gradients(double)


def assert_equals_the_oracle(family: str, layout: str, seed: int = 0) -> None:
    model, (expected, exact) = model_of(family), truth(family, seed)
    model.zero_grad()
    logps = score(model, batch_of(ragged_groups(seed), layout))
    assert float((logps.double() - expected).detach().abs().max()) <= 2e-5
    weighted(logps).backward()
    whole = float(torch.cat([g.flatten() for g in exact.values()]).norm())
    for name, gradient in gradients(model).items():
        gap, own = float((gradient - exact[name]).norm()), float(exact[name].norm())
        assert gap <= 1e-4 * own + 1e-6 * whole, name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_log_probs_and_every_gradient_equal_the_oracle(family: str, layout: str, seed: int) -> None:
    assert_equals_the_oracle(family, layout, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_far_from_uniform(family: str) -> None:
    """Otherwise a wrong attention would pass."""
    assert float(truth(family)[0].std()) > 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gets_its_layout(family: str) -> None:
    layout, reason = choose_layout(model_of(family))
    assert layout == FAMILIES[family].layout
    assert re.search(FAMILIES[family].reason or "leak check passed", reason)


@pytest.mark.parametrize("family", SHARED)
def test_no_completion_sees_another(family: str) -> None:
    model, groups = model_of(family), ragged_groups(seed=1)
    prompt, (first, second, third) = groups[2]
    other = [(token + 1) % VOCABULARY for token in second]
    changed = [*groups[:2], (prompt, [first, other, third]), *groups[3:]]
    with torch.no_grad():
        batch = batch_of(groups, "shared")
        before, after = score(model, batch), score(model, batch_of(changed, "shared"))
    moved = batch.targets.completion_of == 4  # of 2 + 1 + 3 + 5 + 4 completions
    assert float((before - after)[~moved].abs().max()) <= 1e-6
    assert float((before - after)[moved].abs().max()) > 1e-2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", SHARED)
def test_in_no_precision_has_a_completion_gradients_in_another(
    family: str, precision: Precision
) -> None:
    """They are exactly 0, where values would move by less than bfloat16 shows."""
    model = in_precision(model_of(family), precision)
    with autocast(precision, torch.device("cpu")):
        assert _crosstalk(model, ragged_groups(seed=1)) == 0


def in_precision(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    return copy.deepcopy(model).bfloat16() if precision == "bf16-weights" else model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["falcon-h1", "lfm2", "qwen3-next"])
def test_a_state_is_found_whatever_its_name_and_the_precision(
    family: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights as small as at first, its leak is below what two calls in bfloat16 differ by."""
    monkeypatch.setattr(checks, "_has_state", lambda _: None)
    model = in_precision(tiny(FAMILIES[family].config(), scale=1.0), precision)
    with autocast(precision, torch.device("cpu")):
        layout, reason = choose_layout(model)
    assert (layout, "see each other" in reason) == ("padded", True)


@pytest.mark.families
@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_low_precision_batching_adds_only_rounding(family: str, precision: Precision) -> None:
    """Alone, in a batch and in another order: as far from the truth as a plain forward pass.

    Over several seeds together: where two experts are nearly tied, rounding alone chooses one, and
    one seed's tokens are too few to average that out.
    """
    model, layout = in_precision(model_of(family), precision), FAMILIES[family].layout
    gaps: dict[str, list[Tensor]] = {name: [] for name in ("plain", "together", "turned", "apart")}
    for groups in map(ragged_groups, range(3)):
        sizes = [sum(map(len, completions)) for _, completions in groups]
        with torch.no_grad():
            expected = per_token_logps(in_float64(model), groups)
            with autocast(precision, torch.device("cpu")):
                turned = score(model, batch_of(groups[::-1], layout)).split(sizes[::-1])[::-1]
                apart = [score(model, batch_of([(p, [c])], layout)) for p, cs in groups for c in cs]
                found = {
                    "plain": per_token_logps(model, groups),
                    "together": score(model, batch_of(groups, layout)),
                    "turned": torch.cat(turned),
                    "apart": torch.cat(apart),
                }
        for name, logps in found.items():
            gaps[name].append((logps.double() - expected).abs())
    means = {name: float(torch.cat(parts).mean()) for name, parts in gaps.items()}
    assert max(means.values()) <= 1e-3 + 1.5 * means["plain"], means


WAYS = {
    "one call a group": {"SPLIT_CELLS": 10**9, "ROW_TOKENS": 0},
    "two calls a group": {"SPLIT_CELLS": 0, "ROW_TOKENS": 0},
    "long runs in parts": {"SPLIT_CELLS": 0, "ROW_TOKENS": 0, "MASK_CELLS": 0},
    "short groups in rows": {
        "SPLIT_CELLS": 0,
        "ROW_TOKENS": 32,
        "ROW_STEP": 16,
        "TOKENS_PER_ROW": 10**9,
    },
    "all in rows": {"ROW_TOKENS": 999, "TOKENS_PER_ROW": 10**9, "ROW_STEP": 64},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma2", "gpt-oss"])
def test_every_way_to_call_gives_the_oracles_numbers(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(calls, name, value)
    assert_equals_the_oracle(family, "shared")


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(calls, name, value)
    batch = batch_of(ragged_groups(), "shared")
    assert isinstance(batch, SharedBatch)
    shapes = list(map(calls.Shape, batch.prompt_lengths, batch.completion_lengths))
    plan = calls.make_plan(
        shapes, batch.position_ids[0], window=None, dtype=torch.float32, masked=False
    )
    assert [call.rows for call in plan.calls] == {
        "one call a group": [1] * 5,
        "two calls a group": [1] * 9,  # one group has one completion: plain causal attention
        "long runs in parts": [1] * 9,
        "short groups in rows": [1] * 5 + [2],
        "all in rows": [5],
    }[way]
    assert (plan.moves is None) == ("rows" not in way)
    assert any(call.runs for call in plan.calls) == (way == "long runs in parts")


def test_a_groups_log_probs_do_not_depend_on_its_batch_mates() -> None:
    model, groups = model_of("gemma2"), ragged_groups(seed=2)
    with torch.no_grad():
        together = score(model, batch_of(groups * 3, "shared"))
        alone = torch.cat([score(model, batch_of([group], "shared")) for group in groups])
    assert float((together - alone.repeat(3)).abs().max()) <= 2e-6


def test_not_even_a_nan_crosses_to_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "TOKENS_PER_ROW", 10**9)
    monkeypatch.setattr(calls, "ROW_STEP", 64)
    model = tiny(FAMILIES["llama"].config(), scale=4.0)
    groups = [([5, 6], [[7], [8, 9]]), ([10, 11, 12], [[13, 14], [15]])]
    with torch.no_grad():
        next(model.parameters())[5] = torch.nan  # the embeddings
        broken, whole = score(model, batch_of(groups, "shared")).split([3, 3])
    assert bool(broken.isnan().all())
    assert bool(whole.isfinite().all())


def test_a_window_reaches_into_the_prompt_and_no_further() -> None:
    model = tiny(FAMILIES["mistral"].config(num_hidden_layers=1), scale=4.0)
    prompt, completions = [*range(3, 23)], [[30, 31, 32], [40] * (WINDOW + 3)]

    def moved_by(place: int) -> list[bool]:
        changed = [*prompt]
        changed[place] = 100
        with torch.no_grad():
            before, after = (
                score(model, batch_of([(ids, completions)], "shared")) for ids in (prompt, changed)
            )
        return ((before - after).abs() > 1e-5).tolist()

    for place in (len(prompt) - 1, len(prompt) - WINDOW + 1, len(prompt) - WINDOW, 3):
        # The query at position t predicts token t + 1 and sees back to t - WINDOW + 1.
        queries = [len(prompt) - 1 + t for ids in completions for t in range(len(ids))]
        assert moved_by(place) == [0 <= query - place < WINDOW for query in queries]


@pytest.mark.parametrize("layout", ["shared", pytest.param("padded", marks=pytest.mark.families)])
@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_way_to_run_experts_gives_the_oracles_numbers(
    family: str, experts: str, layout: str
) -> None:
    model, before = model_of(family), model_of(family).get_experts_implementation()
    try:
        model.set_experts_implementation(experts)
        assert_equals_the_oracle(family, layout)
    finally:
        model.set_experts_implementation(before)


def test_a_window_that_only_the_mask_knows_of_is_found_by_a_short_probe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window is longer than the probe: only what the model asks for can tell."""
    model = tiny(FAMILIES["mistral"].config(sliding_window=64), scale=4.0)
    assert choose_layout(model)[0] == "shared"
    own = ALL_ATTENTION_FUNCTIONS.get_interface

    def without_window(*arguments: Any) -> Any:
        interface = own(*arguments)
        return lambda *inputs, sliding_window, **options: interface(*inputs, **options)

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", without_window)
    layout, reason = choose_layout(model)
    assert layout == "padded"
    assert "the window of its mask is 64, of its attention None" in reason


@pytest.mark.parametrize("family", SCALED_HEADS)
def test_every_head_is_known(family: str) -> None:
    model = tiny(SCALED_HEADS[family].config(), scale=4.0)
    check_head(model)
    groups = ragged_groups()
    with torch.no_grad():
        expected = per_token_logps(in_float64(model), groups)
        logps = score(model, batch_of(groups, choose_layout(model)[0]))
    assert float((logps.double() - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", UNKNOWN_HEADS)
def test_an_unknown_head_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="head"):
        check_head(tiny(UNKNOWN_HEADS[family].config(), scale=4.0))


def test_a_cap_is_not_left_to_an_attention_that_has_none(tmp_path: Path) -> None:
    capped, plain = (tiny(FAMILIES[name].config()) for name in ("gemma2", "llama"))
    for model in (capped, plain):
        model.config._attn_implementation = "sdpa"  # as some releases choose
        with_softcap(model)
    assert capped.config._attn_implementation == "eager"
    assert plain.config._attn_implementation == "sdpa"
    capped.save_pretrained(tmp_path)
    loaded: Any = load_model(tmp_path)
    assert loaded.config._attn_implementation == "eager"


def test_a_capped_model_of_the_tests_caps_its_attention_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformers 5.17 chooses sdpa for Gemma 2 and silently drops the cap."""
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    model = tiny(ON_GPU["gemma2"](), scale=3.0)
    assert model.config._attn_implementation == "eager"
    groups: list[Group] = [([5, 6, 7], [[8, 9], [10]])]
    padded = score(model, batch_of(groups, "padded")).double()
    assert torch.allclose(padded, per_token_logps(in_float64(model), groups), atol=1e-4)
