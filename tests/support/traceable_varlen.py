"""Variable-length attention as an operator that torch.compile can put into a graph, on a CPU."""

from typing import Any

import pytest
import torch
from plain_attention import plain_varlen
from torch import Tensor

from logratio.logps.attention import fused, varlen
from logratio.logps.attention.kernels import Choice, Wanted
from logratio.logps.sequences import Row


def _attended(states: Any, bounds: Any, left: int, scale: float) -> Tensor:
    return plain_varlen(*states, *bounds, scale=scale, window_size=(left, 0), enable_gqa=True)


@torch.library.custom_op("logratio_tests::varlen", mutates_args=())
def varlen_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    max_queries: int,
    max_keys: int,
    left: int,
    scale: float,
) -> Tensor:
    bounds = (queries, keys, max_queries, max_keys)
    return _attended((query, key, value), bounds, left, scale)


@varlen_op.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *given, queries, keys = ctx.saved_tensors
    max_queries, max_keys, left, scale = ctx.rest
    with torch.enable_grad():
        states = [part.detach().requires_grad_() for part in given]
        out = _attended(states, (queries, keys, max_queries, max_keys), left, scale)
    return *torch.autograd.grad(out, states, upstream), *[None] * 6


varlen_op.register_autograd(_gradients, setup_context=_keep)


def _called(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Row,
    *,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = varlen_op(query, key, value, *row.with_keys, window_size[0], scale)
    return result


@pytest.fixture
def in_one_call(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """Let rows with sequences be computed by the operator; returns what kernels were asked for."""
    asked: list[Wanted] = []

    def choose(wanted: Wanted, *_: Any) -> Choice:
        asked.append(wanted)
        return Choice("varlen" if wanted.sequences else "sdpa", ())

    monkeypatch.setattr(fused, "choose", choose)
    monkeypatch.setattr(varlen, "_torch_varlen", _called)
    return asked
