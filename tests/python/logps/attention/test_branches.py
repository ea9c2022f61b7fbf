"""Trees in variable-length kernels and FlexAttention: their work done plainly on a CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Group, in_float64, per_token_logps
from plain_attention import assert_gathers_like_index_select, heads, plain_varlen
from plain_attention import stand_in as stand_in
from tiny_models import FAMILIES, tiny
from torch import Tensor
from torch.nn.attention import flex_attention
from trees import gradients, related_groups, tree_of

from logratio.logps import checks
from logratio.logps.attention import fused
from logratio.logps.attention.flex import visible
from logratio.logps.attention.fused import TREE, attend_in_one_call, row_of_tree
from logratio.logps.attention.kernels import Choice, Kernel, Wanted, kernel_for
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.attention.tree import SharedTree, attend_tree
from logratio.logps.batch import TreeBatch
from logratio.logps.completion import batch_of, score
from logratio.logps.sequences import Branches

CPU = torch.device("cpu")


def branches_of(batch: TreeBatch) -> Branches:
    """The runs as a GPU gets them."""
    runs = batch.runs
    arrays = (runs.starts, runs.key_offsets, runs.key_index)
    return Branches.of(runs, *map(torch.from_numpy, arrays))


def batch_of_branches(seed: int, count: int = 9) -> TreeBatch:
    batch = tree_of(related_groups(seed, count))
    return replace(batch, branches=branches_of(batch))


def branches(batch: TreeBatch) -> Branches:
    assert batch.branches is not None
    return batch.branches


@pytest.mark.parametrize("seed", range(4))
def test_a_token_is_seen_by_what_continues_it(seed: int) -> None:
    """The mask of flex, and the keys of each run, against the path of every token."""
    batch = batch_of_branches(seed)
    length, positions = batch.input_ids.shape[1], batch.position_ids[0]
    paths = [set(batch.runs.path_to(token).tolist()) for token in range(length)]
    for window in (None, 1, 6):
        expected = torch.tensor([
            [k in paths[q] and (window is None or int(positions[q] - positions[k]) < window)
             for k in range(length)]
            for q in range(length)
        ])  # fmt: skip
        mask = visible(branches(batch), window)
        dense = flex_attention.create_mask(mask, 1, 1, length, length, "cpu")[0, 0]
        assert torch.equal(dense, expected)
    assert torch.equal(branches(batch).positions, positions)


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_a_key_are_added_up(seed: int) -> None:
    assert_gathers_like_index_select(branches(batch_of_branches(seed, 4 + 4 * seed)))


def test_a_common_beginning_does_not_widen_the_sums_of_other_tokens() -> None:
    """A system prompt of 99 groups has 199 copies, and their own prompts have three each."""
    system = list(range(1, 21))
    groups: list[Group] = [
        ([*system, 30 + n % 30, 3, 20 + n // 30, 5], [[7, n % 7 + 1], [9, 2]]) for n in range(99)
    ]
    parts = branches_of(tree_of(groups)).shared_keys
    rows = sum(part.places.numel() for part in parts)
    assert rows <= 2 * len(tree_of(groups).runs.key_index)
    assert len(parts) >= 2
    seen = torch.cat([part.tokens for part in parts])
    assert len(seen) == len(seen.unique())


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("stand_in")
def test_one_call_for_all_runs_is_attention_along_the_paths(seed: int, window: int | None) -> None:
    batch, scoring = batch_of_branches(seed), Scoring(scaling=0.3, window=window)
    states = heads(batch, 4, 2)
    expected = attend_tree(*states, SharedTree(batch), scoring)
    found = attend_in_one_call("varlen", *states, branches(batch), scoring)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(found, states, upstream)
    truth = torch.autograd.grad(expected, states, upstream)
    for one, other in zip(ours, truth, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.fixture
def as_on_a_gpu(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """Score trees by the stand-in; returns what was asked of it."""
    asked: list[Wanted] = []

    def choose(wanted: Wanted, *_: Any) -> Choice:
        asked.append(wanted)
        return Choice("varlen" if wanted.tree else "sdpa", ())

    def with_branches(*given: Any) -> Any:
        batch = batch_of(*given)
        if isinstance(batch, TreeBatch):
            return replace(batch, branches=branches_of(batch))
        return batch

    monkeypatch.setattr(fused, "choose", choose)
    monkeypatch.setattr(checks, "batch_of", with_branches)
    return asked


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_tree_in_one_call_equals_the_oracle(family: str, as_on_a_gpu: list[Wanted]) -> None:
    model, groups = tiny(FAMILIES[family]()), related_groups(seed=len(family))
    double = in_float64(model)
    expected = per_token_logps(double, groups)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    (weights * expected).sum().backward()
    batch = tree_of(groups)
    logps = score(model, replace(batch, branches=branches_of(batch)))
    assert len(as_on_a_gpu) == 2, "one call a layer"
    assert all(wanted.tree and wanted.sequences for wanted in as_on_a_gpu)
    assert float((logps.double() - expected).detach().abs().max()) <= 1e-5
    (weights * logps).sum().backward()
    truth = gradients(double)
    assert float((gradients(model).double() - truth).norm() / truth.norm()) <= 1e-5


def test_the_leak_check_passes_in_one_call(as_on_a_gpu: list[Wanted]) -> None:
    assert checks.check_tree(tiny(FAMILIES["llama"]())) is None
    assert any(wanted.tree for wanted in as_on_a_gpu)


Altered = Callable[..., Tensor]


def shifted(*given: Any, **options: Any) -> Tensor:
    """A kernel whose windows are one token too long."""
    left, right = options["window_size"]
    return plain_varlen(*given, **options | {"window_size": (left + (left >= 0), right)})


@pytest.mark.parametrize(("kernel", "works"), [(plain_varlen, True), (shifted, False)])
def test_a_kernel_is_tried_on_a_tree(
    kernel: Altered, works: bool, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    wanted = Wanted("cuda", torch.float32, 16, 16, heads=4, key_heads=2, windowed=True, tree=True)
    fused.failure.cache_clear()
    reason = fused.failure("varlen", wanted, CPU)
    fused.failure.cache_clear()
    assert (reason is None) == works, reason


def test_the_tree_of_the_trial_branches_at_several_depths() -> None:
    row = row_of_tree(TREE, CPU)
    assert row.positions.max() == 169
    assert [len(part.tokens) for part in row.shared_keys] == [60 + 50, 70]


@pytest.mark.parametrize("kernel", ["merged", "flash3_merged"])
def test_merged_kernels_leave_trees_to_others(kernel: Kernel) -> None:
    wanted = Wanted("cuda", torch.bfloat16, 64, 64, tree=True, repeated=True)
    choice = kernel_for(wanted, missing=(("flash3", "not installed"),))
    assert dict(choice.passed_over)[kernel] == "it does not support trees"
    assert choice.name == "varlen"
