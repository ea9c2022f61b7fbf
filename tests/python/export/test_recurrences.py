"""Recurrent layers by chunks equal their definition, one token after the other in float64."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_model
from torch import Tensor
from torch.nn.functional import softplus

from logratio.export.recurrences import (
    DELTA_CHUNK,
    MAMBA_CHUNK,
    chunked,
    gated_delta_rule,
    inverse_of_unit_lower,
    mamba2_scan,
)

BATCH, HEADS, GROUPS, WIDTH, STATE = 2, 4, 2, 8, 16
LENGTHS = (1, MAMBA_CHUNK - 1, MAMBA_CHUNK, MAMBA_CHUNK + 1, 2 * MAMBA_CHUNK + DELTA_CHUNK + 3)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def mamba_inputs(length: int) -> dict[str, Tensor]:
    torch.manual_seed(length)
    return {
        "hidden_states": drawn(BATCH, length, HEADS, WIDTH),
        "dt": drawn(BATCH, length, HEADS),
        "A": -4 * drawn(HEADS).sigmoid(),
        "B": drawn(BATCH, length, GROUPS, STATE),
        "C": drawn(BATCH, length, GROUPS, STATE),
        "D": drawn(HEADS),
        "dt_bias": drawn(HEADS),
    }


def mamba_by_token(given: dict[str, Tensor]) -> Tensor:
    """By h ← exp(Δ·A)·h + Δ·B xᵀ and y = C·h + D·x."""
    repeated = {name: given[name].repeat_interleave(HEADS // GROUPS, 2) for name in "BC"}
    state, outputs = torch.zeros(BATCH, HEADS, STATE, WIDTH, dtype=torch.float64), []
    for place in range(given["dt"].shape[1]):
        step = softplus(given["dt"][:, place] + given["dt_bias"])
        inputs = given["hidden_states"][:, place]
        into, out_of = repeated["B"][:, place], repeated["C"][:, place]
        added = torch.einsum("bh,bhn,bhp->bhnp", step, into, inputs)
        state = (step * given["A"]).exp()[..., None, None] * state + added
        outputs.append(torch.einsum("bhn,bhnp->bhp", out_of, state) + given["D"][:, None] * inputs)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba2_is_its_recurrence(length: int) -> None:
    given = mamba_inputs(length)
    expected = mamba_by_token(given)
    found = mamba2_scan(**in_float32(given), chunk_size=16, dt_softplus=True)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert expected.std() > 0.5


def delta_inputs(length: int, *, repeats: bool) -> dict[str, Tensor]:
    """Inputs of a delta rule; with equal keys, hardly any decay and shares near 1, or random."""
    torch.manual_seed(length)
    key = drawn(BATCH, length, GROUPS, STATE)
    return {
        "query": drawn(BATCH, length, GROUPS, STATE),
        "key": key[:, :1].expand_as(key) if repeats else key,
        "value": drawn(BATCH, length, HEADS, WIDTH),
        "g": -drawn(BATCH, length, HEADS).sigmoid() * (1e-3 if repeats else 1.0),
        "beta": drawn(BATCH, length, HEADS).sigmoid() * (0.02 if repeats else 1.0)
        + (0.98 if repeats else 0.0),
    }


def delta_by_token(given: dict[str, Tensor]) -> Tensor:
    """By S ← exp(g)·S, then S ← S + β·k (v − kᵀS)ᵀ, and o = qᵀS / √d."""
    query, key = (
        torch.nn.functional.normalize(given[name], dim=-1).repeat_interleave(HEADS // GROUPS, 2)
        for name in ("query", "key")
    )
    state, outputs = torch.zeros(BATCH, HEADS, STATE, WIDTH, dtype=torch.float64), []
    for place in range(key.shape[1]):
        state = given["g"][:, place].exp()[..., None, None] * state
        old = torch.einsum("bhk,bhkv->bhv", key[:, place], state)
        change = given["beta"][:, place, :, None] * (given["value"][:, place] - old)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, place], change)
        outputs.append(torch.einsum("bhk,bhkv->bhv", query[:, place], state) * STATE**-0.5)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("repeats", [False, True], ids=["random", "equal keys"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_gated_delta_rule_is_its_recurrence(length: int, repeats: bool) -> None:
    given = delta_inputs(length, repeats=repeats)
    expected = delta_by_token(given)
    found = gated_delta_rule(**in_float32(given), use_qk_l2norm_in_kernel=True)[0]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert expected.std() > 0.02


def in_float32(given: dict[str, Tensor]) -> dict[str, Any]:
    return {name: values.float() for name, values in given.items()}


def test_the_inverse_of_a_triangular_matrix_keeps_its_digits() -> None:
    size = DELTA_CHUNK
    ones = torch.ones(size, size).tril()  # powers of it have entries above 1e8
    expected = torch.linalg.inv(ones.double())
    np.testing.assert_array_equal(inverse_of_unit_lower(ones), expected)
    torch.manual_seed(0)
    random = torch.randn(3, size, size) / 4
    lower = random.double().tril(-1) + torch.eye(size, dtype=torch.float64)
    found = inverse_of_unit_lower(random).double() @ lower
    np.testing.assert_allclose(found, torch.eye(size).expand(3, -1, -1), atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_5_text"])
def test_a_model_computes_by_chunks_inside_the_context_only(kind: str) -> None:
    model = small_model(kind, 0)
    file = sys.modules[type(model).__module__]
    names = {"mamba2_chunk_scan", "torch_chunk_gated_delta_rule"} & set(vars(file))
    (name,) = names
    own = getattr(file, name)
    with pytest.raises(KeyError), chunked(model):
        assert getattr(file, name) in (mamba2_scan, gated_delta_rule)
        raise KeyError
    assert getattr(file, name) is own
