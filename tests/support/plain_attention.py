"""Attention over sequences of a batch, done plainly, and batches to try it on."""

import numpy as np
import pytest
import torch
from layout_oracle import store_of
from random_groups import random_groups
from torch import Tensor

from logratio.data.feed import lay_out
from logratio.logps.attention import varlen
from logratio.logps.batch import SharedBatch, TreeBatch, fields_for, to_torch
from logratio.logps.completion import score
from logratio.logps.sequences import Row, Sequences

NUMBERS = np.array([3, 0, 4, 1, 2])


FIELDS = fields_for("shared", "cuda")


def batch_of_sequences(seed: int, width: int | None = None, most: int | None = None) -> SharedBatch:
    """A batch as a GPU gets it; `most` completions a group."""
    groups = [(prompt, answers[:most]) for prompt, answers in random_groups(seed)]
    batch = to_torch(lay_out(store_of(groups), NUMBERS, fields=FIELDS, width=width))
    assert isinstance(batch, SharedBatch)
    return batch


def sequences_of(batch: SharedBatch) -> Sequences:
    assert batch.sequences is not None
    return batch.sequences


def assert_gathers_like_index_select(row: Row) -> None:
    """Values are equal, and gradients are equal in float64."""
    states = torch.randn(row.tokens, 3, 4, dtype=torch.float64, requires_grad=True)
    gathered, expected = varlen.gather_keys(states, row), states.index_select(0, row.key_index)
    assert torch.equal(gathered, expected)
    upstream = torch.randn_like(gathered)
    (ours,) = torch.autograd.grad(gathered, states, upstream)
    (truth,) = torch.autograd.grad(expected, states, upstream)
    assert torch.allclose(ours, truth, rtol=0, atol=1e-14)


States = tuple[Tensor, Tensor, Tensor]


def plain_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `varlen_attn` says that it does, one sequence and one query at a time."""
    assert enable_gqa and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    left, right = window_size
    assert right == 0
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    times = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    out = []
    for at in range(len(cu_seqlens_q) - 1):
        q = queries[cu_seqlens_q[at] : cu_seqlens_q[at + 1]]
        k = keys[cu_seqlens_k[at] : cu_seqlens_k[at + 1]]
        v = values[cu_seqlens_k[at] : cu_seqlens_k[at + 1]]
        assert 0 < len(q) <= max_queries
        assert len(q) <= len(k) <= max_keys
        for i in range(len(q)):
            end = len(k) - len(q) + i + 1
            seen = slice(0 if left < 0 else max(0, end - 1 - left), end)
            weights = torch.einsum("hd,khd->hk", q[i], k[seen]).mul(scale).softmax(-1)
            out.append(torch.einsum("hk,khd->hd", weights, v[seen]))
    return torch.stack(out)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the plain attention in place of torch's kernel."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", plain_varlen)
    monkeypatch.setattr(varlen, "_has_enable_gqa", lambda: True)


def heads(
    batch: SharedBatch | TreeBatch, many: int, kv: int, dtype: torch.dtype = torch.float64
) -> States:
    """Random queries, keys and values, `[1, heads, T, 8]`."""
    torch.manual_seed(0)
    shape = (1, batch.input_ids.shape[1], 8)

    def random(count: int) -> Tensor:
        return torch.randn(count, *shape, dtype=dtype).transpose(0, 1).requires_grad_()

    return random(many), random(kv), random(kv)


def plain_mask(batch: SharedBatch, window: int | None) -> Tensor:
    """Visibility of keys in the row, bool `[T, T]`, token by token from the lengths alone."""
    prompts, completions = batch.prompt_lengths, batch.completion_lengths
    part = [
        (group, number, place + (prompts[group] if number else 0))
        for group, answers in enumerate(completions)
        for number, length in enumerate([prompts[group], *answers])
        for place in range(length)
    ]
    part += [(-1, 0, place) for place in range(batch.input_ids.shape[1] - len(part))]
    mask = torch.zeros(len(part), len(part), dtype=torch.bool)
    for q, (group, number, place) in enumerate(part):
        for k, (other, owner, before) in enumerate(part):
            near = window is None or place - before < window
            mask[q, k] = group == other and owner in (0, number) and before <= place and near
    return mask


def score_and_gradient(model: torch.nn.Module, batch: SharedBatch) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of a weighted sum of them with respect to every parameter."""
    model.zero_grad()
    logps = score(model, batch)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(parts)
