"""Scores of completions: equal to transformers' own in every layout, and to nothing beside them."""

from typing import Any

import pytest
import torch
from oracle import in_float64
from random_groups import token_groups
from rewards import plain_scores, tiny_reward_model
from rope_configs import ORIGINAL, config_of
from tiny_models import FAMILIES
from torch import Tensor, nn

from logratio.logps.checks import UnsupportedModelError, check_head, check_tree, choose_layout
from logratio.logps.completion import batch_of
from logratio.logps.scores import has_scalar_head, score_completions

LAYOUTS = ("padded", "shared", "tree")
END = 2
BRANCHES = [
    ([5, 6, 7], [[8, 9, END], [3], [8, 9, END], [8, 9]]),
    ([5, 6, 7, 8, 9], [[END], [4, 5, 6, END, END]]),
    ([5, 6, 7], [[END, END], [8, 4]]),
    ([5, 6, 7, 8], [[9, END], [9, END, 4]]),
]
"""Groups with equal completions, and with completions that begin others."""


def scores(model: nn.Module, groups: Any, layout: str) -> Tensor:
    return score_completions(model, batch_of(groups, layout))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_gradients_equal_those_of_transformers(family: str) -> None:
    model, groups = tiny_reward_model(family), token_groups()
    oracle = in_float64(model)
    expected = plain_scores(oracle, groups)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    for layout in LAYOUTS:
        model.zero_grad()
        found = scores(model, groups, layout)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
        (weights * found).sum().backward()
        for (name, mine), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None, name
            scale = float(theirs.grad.abs().max())
            gap = float((mine.grad.double() - theirs.grad).abs().max())
            assert gap <= 1e-4 * scale + 1e-6, (layout, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad", [None, 0, END])
def test_the_last_token_that_is_not_padding_is_scored(pad: int | None, layout: str) -> None:
    model = tiny_reward_model(pad=pad).double()
    with torch.no_grad():
        expected, found = plain_scores(model, BRANCHES), scores(model, BRANCHES, layout)
        at_prompt = plain_scores(model, [([5, 6, 7, 8], [[9]])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    same = [one for one, ids in enumerate(BRANCHES[0][1]) if ids == [8, 9, END]]
    assert found[same[0]] == found[same[1]]
    if pad == END:  # the prompt's end is scored where nothing else is left
        assert found[4] == pytest.approx(float(at_prompt))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_a_score_does_not_depend_on_the_batch(layout: str, dtype: torch.dtype, most: float) -> None:
    """In the shared row a completion's neighbours change, and with them the width of the rows."""
    model: Any = tiny_reward_model()
    model.to(dtype)
    (prompt, (own, other)), *rest = token_groups(seed=3)
    with torch.no_grad():
        alone = scores(model, [(prompt, [own])], layout)[0]
        scale = float(scores(model, token_groups(seed=3), layout).abs().max())
        for groups in (
            [(prompt, [own, other])],
            [(prompt, [own, own[:1], [*own, 4]]), *rest],
            [(prompt, [own, list(reversed(other))]), (prompt + own[:1], [other])],
        ):
            assert float((scores(model, groups, layout)[0] - alone).abs()) <= most * scale


def test_the_head_multiplies_in_float32_under_autocast() -> None:
    """In bfloat16 a score near 100 could only change by 0.5."""
    model: Any = tiny_reward_model()
    with torch.no_grad():
        model.score.weight.mul_(100 / scores(model, BRANCHES, "padded").abs().max())
        with torch.autocast("cpu", torch.bfloat16):
            found = scores(model, BRANCHES, "padded")
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.parametrize("rope", ["phi3", "llama with dynamic NTK"])
def test_calls_that_are_split_keep_the_order_of_completions(rope: str) -> None:
    model, groups = tiny_reward_model(config_of(rope)), token_groups(completions=3)
    groups = [
        ([one % 190 for one in prompt], [[one % 190 for one in ids] for ids in answers])
        for prompt, answers in groups
    ]
    groups[0][1][1] = groups[0][1][1] * 8
    groups[2][1][0] = groups[2][1][0] * 9
    lengths = [len(prompt) + len(ids) for prompt, answers in groups for ids in answers]
    assert sorted(length > ORIGINAL for length in lengths)[-2:] == [True, True]
    each = [(prompt, [ids]) for prompt, answers in groups for ids in answers]
    with torch.no_grad():  # a forward pass of dynamic NTK affects those after it
        expected = torch.cat([plain_scores(in_float64(model), [one]) for one in each])
        for layout in ("padded", "shared"):
            found = scores(model, groups, layout).double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_prompts_and_beginnings_are_shared_even_with_a_head_of_zeros(factor: float) -> None:
    model: Any = tiny_reward_model()
    model.score.weight.data.mul_(factor)
    assert has_scalar_head(model)
    assert choose_layout(model, share_beginnings=True) == ("tree", "leak check passed")
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_layout(model) == ("shared", "leak check passed")


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_a_leak_is_found_however_small_the_scores_are(factor: float) -> None:
    model: Any = tiny_reward_model()
    model.score.weight.data.mul_(factor)
    layer: Any = model.model.layers[0]
    plain = layer.forward

    def leaking(hidden: Tensor, *given: Any, **named: Any) -> Tensor:
        if "shared_prompt" in named:  # every token sees the mean of the row
            hidden = hidden + hidden.mean(1, keepdim=True)
        return plain(hidden, *given, **named)  # type: ignore[no-any-return]

    layer.forward = leaking
    layout, reason = choose_layout(model)
    assert layout == "padded" and "see each other" in reason
    assert check_tree(model) is not None


def test_a_head_that_the_scores_do_not_follow_is_refused() -> None:
    model = tiny_reward_model()
    plain = model.forward

    def doubled(*given: Any, **named: Any) -> Any:
        output = plain(*given, **named)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(UnsupportedModelError, match="unknown way"):
        check_head(model)
    model.forward = plain
    model.config.num_labels = 2
    with pytest.raises(UnsupportedModelError, match="one output"):
        check_head(model)
