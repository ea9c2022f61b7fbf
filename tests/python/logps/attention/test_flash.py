"""Merged attention to the prompt and within the sequence equals attention to gathered keys.

The kernel's work is done plainly on a CPU, in float64; what is checked is what it is handed, and
what becomes of its two outputs and two gradients.
"""

import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from math import inf
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from plain_attention import batch_of_sequences, heads, plain_mask, score_and_gradient, sequences_of
from plain_flash import PLAIN, States, on_cpu, plain_backward, plain_forward
from tiny_models import FAMILIES, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.logps.attention import flash, fused
from logratio.logps.attention.flash import (
    TORCH,
    Flash,
    _Merged,
    attend_merged,
    flash_of,
    merging_pays,
)
from logratio.logps.attention.kernels import Choice, Wanted
from logratio.logps.sequences import Bounds, Sequences

CPU = torch.device("cpu")
Groups = tuple[tuple[int, tuple[int, ...]], ...]
ROWS: dict[str, Groups] = {
    "pairs": ((7, (5, 9)), (11, (6, 4)), (3, (1, 2))),
    "many": ((9, (2, 1, 7, 3, 3, 5)), (4, (2,)), (6, (1, 1, 1))),
    "empty completions": ((5, (0, 3)), (4, (0, 0)), (2, (6, 0))),
    "empty prompts": ((0, (4, 2)), (5, (3, 3)), (0, (1,))),
    "of one token": ((1, (0, 1)), (0, (1,))),
}


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    for remembered in (fused.failure, fused.choose, flash._flash3):
        remembered.cache_clear()
    yield
    for remembered in (fused.failure, fused.choose, flash._flash3):
        remembered.cache_clear()


def visible(groups: Groups) -> Tensor:
    """Visibility of keys, bool `[T, T]`, from the lengths alone."""
    numbers = count()
    rows = [
        (group, number, [next(numbers) for _ in range(length)])
        for group, (prompt, answers) in enumerate(groups)
        for number, length in enumerate((prompt, *answers))
    ]
    mask = torch.zeros(2 * [sum(len(tokens) for *_, tokens in rows)], dtype=torch.bool)
    for group, number, queries in rows:
        for other, owner, keys in rows:
            if group == other and owner in (0, number):
                for q in queries:
                    for k in keys:
                        mask[q, k] = k <= q
    return mask


def drawn(tokens: int, many: int, kv: int) -> States:
    """Random queries, keys and values as a model makes them: `[1, heads, T, 8]`, strided."""
    torch.manual_seed(0)

    def random(count: int) -> Tensor:
        made = torch.randn(1, tokens, count, 8, dtype=torch.float64).transpose(1, 2)
        return made.detach().requires_grad_()

    return random(many), random(kv), random(kv)


def by_mask(states: States, mask: Tensor, scale: float) -> Tensor:
    query, key, value = states
    times = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(times, 1).mT * scale
    weights = scores.masked_fill(~mask, -inf).softmax(-1)
    return (weights @ value.repeat_interleave(times, 1)).transpose(1, 2)


def assert_same(found: Tensor, truth: Tensor, states: States) -> None:
    """Compare values, and the gradients of a weighted sum."""
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    upstream = torch.randn_like(truth)
    ours = torch.autograd.grad(found, states, upstream)
    for one, other in zip(ours, torch.autograd.grad(truth, states, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nothing", [inf, -inf])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
def test_merged_attention_is_attention_by_mask(groups: Groups, kv: int, nothing: float) -> None:
    row = fused.row_of(groups, CPU)
    states = drawn(row.tokens, 4, kv)
    plain = Flash(partial(plain_forward, nothing=nothing), plain_backward)
    found = attend_merged(*states, row, plain, 0.3)
    assert_same(found, by_mask(states, visible(groups), 0.3), states)


@pytest.mark.parametrize("width", [None, 300])
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_the_planner_are_merged_and_filler_sees_itself(
    seed: int, width: int | None
) -> None:
    batch = batch_of_sequences(seed, width)
    states = heads(batch, 4, 2)
    found = attend_merged(*states, sequences_of(batch), PLAIN, None)
    assert_same(found, by_mask(states, plain_mask(batch, None), 8**-0.5), states)


def test_prompts_are_the_keys_of_their_completions() -> None:
    row = fused.row_of(((3, (2, 4)), (5, (1,))), CPU)
    queries, keys, *most = row.on_prompts
    assert queries.tolist() == [0, 3, 9, 14, 15, 15]
    assert keys.tolist() == [0, 0, 3, 3, 8, 8]
    assert most == [6, 5]
    assert row.prompt_rows.tolist() == [0, 1, 2, 9, 10, 11, 12, 13]


def test_torchs_operators_are_called_twice_each_way() -> None:
    groups = ROWS["many"]
    row = fused.row_of(groups, CPU)
    states = drawn(row.tokens, 4, 2)
    with on_cpu() as ran:
        found = attend_merged(*states, row, TORCH, None)
        assert_same(found, by_mask(states, visible(groups), 8**-0.5), states)
    assert ran == ["forward"] * 2 + ["backward"] * 2


class Names(TorchDispatchMode):
    """Counts the operators that reach the device, and holds none of them up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, operator: Any, _types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        self.seen.append(operator._schema.name)
        return operator(*arguments, **(named or {}))


def test_cuda_takes_the_arguments_and_is_not_waited_for() -> None:
    """On tensors of a device that is not there: the real schemas, and no value is read."""
    with FakeTensorMode(), Names() as names:
        here = fused.row_of(ROWS["pairs"], torch.device("cpu"))
        moved: dict[str, Any] = {name: part.to("cuda") for name, part in tensors(here).items()}
        row = dataclasses.replace(here, **moved)
        shape: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        states = [torch.empty(row.tokens, n, 64, **shape) for n in (8, 2, 2)]
        kept = SimpleNamespace()  # autograd's own thread needs the device
        kept.save_for_backward = lambda *parts: setattr(kept, "saved_tensors", parts)
        query, key, value = states
        out = _Merged.forward(kept, query, key, value, row, TORCH, None)
        gradients: Any = _Merged.backward(kept, torch.empty_like(out))
    assert (out.shape, out.dtype) == ((row.tokens, 8, 64), torch.bfloat16)
    assert [part.shape for part in gradients[:3]] == [part.shape for part in states]
    assert names.seen.count("aten::_flash_attention_forward") == 2
    assert names.seen.count("aten::_flash_attention_backward") == 2
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(names.seen)


def tensors(row: Sequences) -> dict[str, Tensor]:
    return {name: part for name, part in vars(row).items() if isinstance(part, Tensor)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_scores_the_same_merged(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(FAMILIES[family]()), batch_of_sequences(2)
    expected, truth = score_and_gradient(model, batch)
    monkeypatch.setattr(fused, "choose", lambda *_: Choice("merged", ()))
    with on_cpu() as ran:
        found, gradient = score_and_gradient(model, batch)
    assert len(ran) == 8  # two layers
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((gradient - truth).norm() / truth.norm()) <= 1e-5


WANTED = Wanted("cuda", torch.bfloat16, 16, 16, heads=4, key_heads=2, repeated=True)


def forgetful(gradient: Tensor, states: Any, out: Tensor, lse: Tensor, *rest: Any) -> Any:
    """A backward pass with the output and log-sum-exp of its own keys, not the merged ones."""
    own = plain_forward(*states, *rest)
    return plain_backward(gradient, states, *own, *rest)


def lengthwise(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """A log-sum-exp as `[T, H]`, in whose memory another version may have it."""
    out, lse = plain_forward(q, k, v, *rest)
    return out, lse.t().reshape(lse.shape)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (PLAIN, None),
        (Flash(plain_forward, forgetful), "its results are wrong here"),
        (Flash(lengthwise, plain_backward), "its results are wrong here"),
    ],
)
def test_the_trial_covers_both_passes(kernel: Flash, reason: str | None) -> None:
    with on_cpu(kernel):
        found = fused.failure("merged", WANTED, CPU)
    assert found is None if reason is None else str(found).startswith(reason)


def test_where_the_operators_fail_the_next_kernel_is_taken() -> None:
    reason = fused.failure("merged", WANTED, CPU)
    assert "NotImplementedError" in str(reason)


@pytest.mark.parametrize(
    ("groups", "heads", "pays"),
    [
        (((500, (200, 200)),) * 4, (32, 8), False),
        (((1000, (50, 50)),) * 4, (32, 8), False),
        (((600, (150,) * 8),) * 4, (32, 8), True),
        (((500, (150,) * 8),) * 4, (12, 12), True),
        (((50, (150,) * 8),) * 4, (32, 8), False),
        (((500, (200,)),) * 4, (12, 12), False),
    ],
)
def test_many_completions_of_long_prompts_are_merged(
    groups: Groups, heads: tuple[int, int], pays: bool
) -> None:
    assert merging_pays(fused.row_of(groups, CPU), *heads) is pays


@pytest.mark.parametrize("pays", [True, False])
def test_the_batch_decides_whether_keys_are_merged(
    pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it repeats, each batch for itself."""
    seen: list[Wanted] = []

    def choose(wanted: Wanted, *_: Any) -> Choice:
        seen.append(wanted)
        return Choice("sdpa", ())

    monkeypatch.setattr(fused, "choose", choose)
    monkeypatch.setattr(fused, "merging_pays", lambda *_: pays)
    score_and_gradient(tiny(FAMILIES["llama"]()), batch_of_sequences(0))
    assert {wanted.repeated for wanted in seen} == {pays}


@pytest.fixture
def flash3(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """FlashAttention-3's interface, its work done plainly; the list gets each call's options."""
    calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, *bounds: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        calls.append(options)
        assert options.pop("return_attn_probs")
        causal, scale = options["causal"], options["softmax_scale"]
        return plain_forward(q, k, v, Bounds(*bounds), causal, scale, nothing=-inf)

    def _flash_attn_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sequed_q: None,
        sequed_k: None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        softmax_scale: float,
        is_causal: bool,
        deterministic: bool,
    ) -> None:
        assert sequed_q is sequed_k is None
        calls.append({"deterministic": deterministic, "softmax_scale": softmax_scale})
        bounds = Bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = plain_backward(dout, (q, k, v), out, softmax_lse, bounds, is_causal, softmax_scale)
        for given, part in zip((dq, dk, dv), found, strict=True):
            given.copy_(part)

    module = ModuleType("flash_attn_interface")
    vars(module).update(
        flash_attn_varlen_func=flash_attn_varlen_func, _flash_attn_backward=_flash_attn_backward
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return calls


def test_flash_attention_3_merges_too(flash3: list[dict[str, Any]]) -> None:
    groups = ROWS["many"]
    row = fused.row_of(groups, CPU)
    states = drawn(row.tokens, 4, 2)
    found = attend_merged(*states, row, flash_of("flash3_merged"), None)
    assert_same(found, by_mask(states, visible(groups), 8**-0.5), states)
    assert [call.get("causal") for call in flash3[:2]] == [True, False]
    assert flash3[2:] == [{"deterministic": False, "softmax_scale": 8**-0.5}] * 2
    assert fused.failure("flash3_merged", WANTED, CPU) is None
