"""Attention of long runs in parts: the values of one call, and memory that is linear in length."""

from collections.abc import Callable

import pytest
import torch
from gradients import assert_equal
from oracle import Group, in_float64
from plain_attention import batch_of_sequences, heads, plain_mask
from tiny_models import GROUPED, VOCABULARY, tiny
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

from logratio.logps.attention import SharedPrompt, parts, plan, shared_prompts
from logratio.logps.attention.parts import LEAST_ROWS, Run, part_mask, parts_of
from logratio.logps.attention.sdpa import Scoring, attend
from logratio.logps.completion import batch_of, score
from logratio.training.activations import LayerOptions, layer_options, measure_layers

LONG = {**GROUPED, "num_hidden_layers": 1, "max_position_embeddings": 2**15}
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "whole prompts": lambda: LlamaConfig(**LONG),
    "windows": lambda: MistralConfig(**LONG, sliding_window=300),
}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute every masked call in parts of a few queries."""
    monkeypatch.setattr(plan, "MASK_CELLS", 0)
    monkeypatch.setattr(plan, "ROW_TOKENS", 0)
    monkeypatch.setattr(parts, "PART_CELLS", 100)
    monkeypatch.setattr(parts, "LEAST_ROWS", 3)


def by_definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scoring: Scoring) -> Tensor:
    """Attention of a row with one dense mask, as a formula: `[1, T, H, D]`."""
    times = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(times, 1).mT * q.shape[-1] ** -0.5
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    out: Tensor = (weights @ v.repeat_interleave(times, 1)).transpose(1, 2)
    return out


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.usefixtures("small_parts")
def test_parts_equal_the_definition_in_values_and_gradients(
    window: int | None, sinks: bool, softcap: float | None
) -> None:
    batch = batch_of_sequences(seed=1)
    states = heads(batch, 4, 2)
    given = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
    scoring = Scoring(window=window, softcap=softcap, sinks=given if sinks else None)
    wanted = [*states, given] if sinks else [*states]
    out = attend(*states, SharedPrompt(batch), scoring)
    truth = by_definition(*states, plain_mask(batch, window), scoring)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    found = torch.autograd.grad(out, wanted, upstream)
    expected = torch.autograd.grad(truth, wanted, upstream)
    for one, other in zip((out, *found), (truth, *expected), strict=True):
        assert float((one - other).detach().abs().max()) <= 1e-12


@pytest.mark.usefixtures("small_parts")
def test_the_backward_pass_drops_the_weights_that_the_forward_pass_dropped() -> None:
    """The output is linear in the values, so its product with them is that of the gradient."""
    batch = batch_of_sequences(seed=2)
    query, key, value = heads(batch, 2, 2)
    torch.manual_seed(3)
    out = attend(query, key, value, SharedPrompt(batch), Scoring(dropout=0.5, window=9))
    torch.manual_seed(4)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, value, upstream)
    assert float(((out * upstream).sum() - (gradient * value).sum()).detach().abs()) <= 1e-10


@pytest.mark.usefixtures("small_parts")
def test_autocast_reaches_the_parts_and_their_backward_pass() -> None:
    batch = batch_of_sequences(seed=3)
    states, scoring = heads(batch, 4, 2, torch.float32), Scoring(window=9)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*states, SharedPrompt(batch), scoring)
    assert out.dtype == torch.bfloat16
    truth = by_definition(*states, plain_mask(batch, 9), scoring)
    upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    found = torch.autograd.grad(out, states, upstream.bfloat16())
    expected = torch.autograd.grad(truth, states, upstream)
    for one, other in zip((out, *found), (truth, *expected), strict=True):
        assert float((one.float() - other).detach().norm() / other.detach().norm()) <= 0.02


@pytest.mark.parametrize("window", [None, 7, 5_000])
@pytest.mark.parametrize("stored_heads", [1, 8])
def test_parts_cover_each_query_once_within_their_limit(
    window: int | None, stored_heads: int
) -> None:
    runs = [Run(0, 9_000), Run(9_000, 9_400, ((0, 9_000),)), Run(9_400, 9_401, ((0, 9_000),))]
    found = list(parts_of(runs, window, stored_heads))
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(9_401))
    for part in found:
        queries, keys = part.shape
        assert queries <= LEAST_ROWS or queries * keys * stored_heads <= parts.PART_CELLS
        assert part.keys[-1][1] == part.stop
        assert keys < queries + (window or 10_000)


def test_a_mask_is_causal_and_ends_at_the_window() -> None:
    (part,) = parts_of([Run(4, 6, ((0, 4),))], 3)
    assert part.keys == ((2, 4), (4, 6))
    seen = part_mask(part, 3, torch.zeros(0)) == 0
    assert seen[0, 0].int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


def random_ids(count: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (count,)).tolist()


def long_pair(name: str) -> Group:
    """A pair whose prompt (with windows), or whose completions together, are computed in parts."""
    torch.manual_seed(0)
    prompt, *answers = (8_000, 1_200, 1_000) if name == "whole prompts" else (4_400, 350, 200)
    return random_ids(prompt), [random_ids(length) for length in answers]


def parts_are_used(model: PreTrainedModel, group: Group) -> bool:
    batch = batch_of([group], "shared")
    window = getattr(model.config, "sliding_window", None)
    calls = SharedPrompt(batch).plan(window, torch.float32).calls  # type: ignore[arg-type]
    return any(call.runs for call in calls)


def sequence_logps(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """Score one sequence: like `oracle.per_token_logps`, but without a step per token."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    chosen: Tensor = logps.gather(1, torch.tensor(completion)[:, None])[:, 0]
    return chosen


@pytest.mark.parametrize("name", MODELS)
def test_a_pair_with_a_long_prompt_equals_the_oracle(name: str) -> None:
    """The oracle computes each sequence on its own in float64, with transformers' attention."""
    model, group = tiny(MODELS[name](), scale=4.0), long_pair(name)
    assert parts_are_used(model, group)
    double = in_float64(model)
    double.set_attn_implementation("sdpa")
    prompt, completions = group
    expected = torch.cat([sequence_logps(double, prompt, ids) for ids in completions])
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    logps = score(model, batch_of([group], "shared"))
    (weights * logps).sum().backward()
    assert float((logps.double() - expected).detach().abs().max()) <= 2e-5
    for one, other in zip(model.parameters(), double.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert float((one.grad - other.grad).norm()) <= 1e-4 * float(other.grad.norm())


@pytest.mark.parametrize("name", MODELS)
def test_completions_of_a_long_prompt_do_not_see_each_other(name: str) -> None:
    model, (prompt, (first, second)) = tiny(MODELS[name](), scale=4.0), long_pair(name)
    with torch.no_grad():
        before = score(model, batch_of([(prompt, [first, second])], "shared"))
        after = score(model, batch_of([(prompt, [first[::-1], second])], "shared"))
    assert torch.equal(before[len(first) :], after[len(first) :])
    assert not torch.equal(before[: len(first)], after[: len(first)])


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_layers_have_the_same_gradients(name: str) -> None:
    found = []
    for layers in (0, 1):
        model, batch = tiny(MODELS[name](), scale=4.0), batch_of([long_pair(name)], "shared")
        with shared_prompts(model), layer_options(model, LayerOptions(checkpointed=layers)):
            logps = score(model, batch)
            logps.sum().backward()
        found.append((logps.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert_equal(*found)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**LONG),
        MistralConfig(**LONG, sliding_window=300),
        Gemma2Config(
            **LONG | {"num_attention_heads": 1, "num_key_value_heads": 1},
            query_pre_attn_scalar=8,
            layer_types=["full_attention"],
        ),
    ],
    ids=["whole prompts", "windows", "caps"],
)
def test_what_a_layer_keeps_grows_with_the_length_and_not_with_its_square(
    config: PreTrainedConfig,
) -> None:
    model = tiny(config, scale=1.0)

    def kept(prompt: int) -> float:
        group = ([7] * prompt, [[8] * 1_400, [9] * 1_400])
        batch = batch_of([group], "shared")
        (layer,) = measure_layers(model, lambda: score(model, batch))
        return layer.everything / (prompt + 2_800)

    assert kept(6_000) <= 1.01 * kept(4_300)
