"""The sequences of a batch, and attention over them: their kernels' work done plainly on a CPU.

GPUs are rare, so what the kernels are handed is checked here: a plain variable-length attention in
their place, written from their documentation, gives what attention group by group gives.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from layout_oracle import store_of
from plain_attention import (
    FIELDS,
    NUMBERS,
    assert_gathers_like_index_select,
    batch_of_sequences,
    heads,
    plain_mask,
    score_and_gradient,
    sequences_of,
)
from plain_attention import (
    stand_in as stand_in,
)
from random_groups import random_groups
from tiny_models import FAMILIES, tiny
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from logratio.data.feed import lay_out
from logratio.logps.attention import SharedPrompt, fused
from logratio.logps.attention.flex import attend_row, visible
from logratio.logps.attention.interface import NAME, shared_prompt_attention
from logratio.logps.attention.kernels import Choice, Kernel
from logratio.logps.attention.varlen import attend_sequences, gather_keys
from logratio.logps.batch import SEQUENCES, SharedBatch, fields_for, to_torch


@pytest.mark.parametrize("width", [None, 300])
@pytest.mark.parametrize("seed", range(3))
def test_sequences_say_where_every_token_is(seed: int, width: int | None) -> None:
    batch = batch_of_sequences(seed, width)
    found = sequences_of(batch)
    lengths: list[int] = []
    prompts: list[int] = []
    for prompt, answers in zip(batch.prompt_lengths, batch.completion_lengths, strict=True):
        first = len(lengths)
        lengths += [prompt, *answers]
        prompts += [first] * (1 + len(answers))
    filler = batch.input_ids.shape[1] - sum(lengths)
    lengths, prompts = lengths + [filler] * (filler > 0), prompts + [len(prompts)] * (filler > 0)
    assert found.of_token.tolist() == [n for n, many in enumerate(lengths) for _ in range(many)]
    stops = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    last = [max(n for n, first in enumerate(prompts) if first == own) for own in prompts]
    ends = [stops[last[n]] if prompts[n] == n else stops[n] for n in range(len(lengths))]
    assert found.ends.tolist() == [ends[n] for n in found.of_token.tolist()]
    tokens = torch.arange(sum(lengths))
    assert torch.equal(found.key_index[found.own_place], tokens)
    own = found.cu_seqlens_k[found.of_token + 1] > found.own_place
    assert bool((own & (found.cu_seqlens_k[found.of_token] <= found.own_place)).all())
    real = sum(lengths) - filler
    assert torch.equal(found.positions[:real], batch.position_ids[0, :real])


def test_a_cpu_lays_out_no_sequences() -> None:
    assert fields_for("shared", "cpu") is None
    assert fields_for("padded", "cuda:1") is None
    batch = to_torch(lay_out(store_of(random_groups(0)), NUMBERS))
    assert isinstance(batch, SharedBatch)
    assert batch.sequences is None


def test_a_gpu_is_asked_for_the_usual_arrays_and_the_sequences() -> None:
    store = store_of(random_groups(0))
    usual = lay_out(store, NUMBERS).table
    assert FIELDS is not None
    assert set(FIELDS) == set(usual) | set(SEQUENCES)
    assert len(set(FIELDS)) == len(FIELDS)


@pytest.mark.parametrize("most", [None, 1, 2])
@pytest.mark.parametrize("width", [None, 300])
@pytest.mark.parametrize("seed", range(3))
def test_gathered_keys_have_the_gradient_of_index_select(
    seed: int, width: int | None, most: int | None
) -> None:
    assert_gathers_like_index_select(sequences_of(batch_of_sequences(seed, width, most)))


def test_the_gradient_of_keys_is_rounded_once() -> None:
    """1 and 2^-8 twice: next to 1, bfloat16 has 1 + 2^-7; adding one by one would lose both."""
    groups = [([7], [([1], [1], 2), ([2], [1], 2)])]
    batch = to_torch(lay_out(store_of(groups), np.array([0]), fields=FIELDS))
    assert isinstance(batch, SharedBatch)
    sequences = sequences_of(batch)
    states = torch.zeros(3, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.where(sequences.key_index == 0, 2.0**-8, 0.0)
    upstream[0] = 1.0
    upstream = upstream.to(torch.bfloat16)[:, None, None]
    (gradient,) = torch.autograd.grad(gather_keys(states, sequences), states, upstream)
    assert gradient.flatten().tolist() == [1.0 + 2.0**-7, 0.0, 0.0]


def test_keys_have_gradients_of_their_own_dtype_under_autocast() -> None:
    sequences = sequences_of(batch_of_sequences(0, None, None))
    states = torch.randn(sequences.tokens, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    gathered = gather_keys(states, sequences)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(gathered, states, torch.ones_like(gathered))
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.usefixtures("stand_in")
def test_varlen_attention_is_attention_group_by_group(
    seed: int, kv: int, window: int | None
) -> None:
    batch = batch_of_sequences(seed)
    states = heads(batch, 4, kv)
    expected, _ = shared_prompt_attention(
        torch.nn.Identity(),
        *states,
        ALL_MASK_ATTENTION_FUNCTIONS[NAME](local_size=window, device="cpu"),  # as a model asks
        shared_prompt=SharedPrompt(batch),
        sliding_window=window,
        scaling=0.3,
    )
    found = attend_sequences(
        *states, sequences_of(batch), kernel="varlen", scaling=0.3, window=window
    )
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(found, states, upstream)
    truth = torch.autograd.grad(expected, states, upstream)
    for one, other in zip(ours, truth, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("stand_in")
def test_filler_changes_nothing() -> None:
    narrow, wide = batch_of_sequences(0), batch_of_sequences(0, 300)
    states = heads(wide, 2, 2)
    length = narrow.input_ids.shape[1]
    q, k, v = (part[:, :, :length] for part in states)
    found = attend_sequences(*states, sequences_of(wide), kernel="varlen", scaling=None)
    alone = attend_sequences(q, k, v, sequences_of(narrow), kernel="varlen", scaling=None)
    assert not found.isnan().any()
    assert torch.equal(found[:, :length], alone)


@pytest.mark.parametrize(
    ("kernel", "name", "more"),
    [("flash_attn", "flash_attn", {"dropout_p": 0.0}), ("flash3", "flash_attn_interface", {})],
)
def test_flash_attn_is_called_by_its_own_names(
    kernel: Kernel, name: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_on: dict[str, Any] = {}

    def flash_attn_varlen_func(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        passed_on.update(options, positional=len(rest))
        return q

    module = type(torch)(name)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, name, module)
    batch = batch_of_sequences(0)
    attend_sequences(
        *heads(batch, 2, 1),
        sequences_of(batch),
        kernel=kernel,
        scaling=0.5,
        softcap=30.0,
        window=7,
    )
    assert passed_on == {
        "positional": 6,
        "causal": True,
        "window_size": (6, 0),
        "softcap": 30.0,
        "softmax_scale": 0.5,
        "deterministic": False,
        **more,
    }


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("width", [None, 150])
@pytest.mark.parametrize("seed", range(2))
def test_the_mask_of_flex_is_who_sees_whom(
    seed: int, width: int | None, window: int | None
) -> None:
    batch = batch_of_sequences(seed, width)
    length = batch.input_ids.shape[1]
    mask = visible(sequences_of(batch), window)
    dense = flex_attention.create_mask(mask, 1, 1, length, length, "cpu")[0, 0]
    assert torch.equal(dense, plain_mask(batch, window))


@pytest.fixture
def quiet_flex() -> Iterator[None]:
    """Let FlexAttention say that it is slow on a CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


@pytest.mark.parametrize(("kv", "window", "softcap"), [(2, None, None), (1, 5, 3.0)])
@pytest.mark.usefixtures("quiet_flex")
def test_flex_attention_is_attention_by_mask(
    kv: int, window: int | None, softcap: float | None
) -> None:
    batch = batch_of_sequences(1)
    with torch.no_grad():
        states = heads(batch, 2, kv, torch.float32)
        query, key, value = (part.detach() for part in states)
        found = attend_row(query, key, value, sequences_of(batch), 0.4, window, softcap)
        scores = query @ key.repeat_interleave(2 // kv, 1).mT * 0.4
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~plain_mask(batch, window), -torch.inf)
        expected = scores.softmax(-1) @ value.repeat_interleave(2 // kv, 1)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.usefixtures("stand_in")
def test_a_model_scores_the_same_through_sequences(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(FAMILIES[family]()), batch_of_sequences(2)
    expected, truth = score_and_gradient(model, batch)
    used: list[Kernel] = []

    def choose(*_: Any) -> Choice:
        used.append("varlen")
        return Choice("varlen", ())

    monkeypatch.setattr(fused, "choose", choose)
    found, gradient = score_and_gradient(model, batch)
    assert len(used) == 2  # layers
    assert torch.allclose(found, expected, atol=1e-5)
    assert float((gradient - truth).norm() / truth.norm()) <= 1e-5


def test_autocast_is_followed() -> None:
    states = torch.zeros(1)
    assert fused._dtype(states) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert fused._dtype(states) == torch.bfloat16
