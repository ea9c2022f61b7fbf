"""The token budget grows by trying, is halved when memory runs out, and loses no group."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import store_of

from logratio.training import TrainConfig, memory, models
from logratio.training.memory import (
    CEILING,
    FIRST,
    GroupQueue,
    TokenBudget,
    is_out_of_memory,
    token_budget,
)
from logratio.training.models import AT_ONCE, training_budget

GROUPS = [(3, [4, 5]), (10, [20, 1]), (2, [2]), (3, [4, 5]), (1, [1, 1, 1, 9])]
SHARED, WIDTHS, ROWS = [12, 31, 4, 12, 13], [8, 30, 4, 8, 10], [2, 2, 1, 2, 4]


@pytest.mark.parametrize("budget", [1, 12, 24, 25, 31, 44, 1000])
def test_shared_batches_fill_the_budget_and_lose_nothing(budget: int) -> None:
    queue = GroupQueue(store_of(*GROUPS), np.arange(5), "shared")
    batches = []
    while len(queue):
        batches.append(queue.take(budget).tolist())
    assert [group for batch in batches for group in batch] == [1, 4, 0, 3, 2]
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        used = sum(SHARED[g] for g in batch)
        assert used <= budget or len(batch) == 1
        assert not following or used + SHARED[following[0]] > budget


@pytest.mark.parametrize("budget", [1, 30, 40, 60, 1000])
def test_padded_batches_count_the_padding(budget: int) -> None:
    queue = GroupQueue(store_of(*GROUPS), np.arange(5), "padded")
    taken = []
    while len(queue):
        batch = queue.take(budget).tolist()
        width, rows = max(WIDTHS[g] for g in batch), sum(ROWS[g] for g in batch)
        assert width * rows <= budget or len(batch) == 1
        taken += batch
    assert sorted(taken) == [0, 1, 2, 3, 4]


def test_only_the_groups_that_are_asked_for() -> None:
    queue = GroupQueue(store_of(*GROUPS), np.array([0, 2, 4]), "shared")
    assert queue.take(1000).tolist() == [4, 0, 2]
    queue.position = 1
    assert queue.take(12).tolist() == [0]


def test_it_doubles_until_a_batch_does_not_fit_and_then_stays() -> None:
    """Memory for 5,000 tokens: 4,096 is the largest power of two that fits."""
    budget, tried = TokenBudget(1024, 2**16), []
    for _ in range(12):
        tokens = budget.tokens
        tried.append(tokens)
        if tokens <= 5000:
            budget.fitted(tokens)
        else:
            budget.exceeded(tokens)
    assert tried == [1024, 2048, 4096, 8192, *[4096] * 8]


def test_it_stops_at_the_ceiling_and_waits_until_the_budget_itself_was_tried() -> None:
    budget = TokenBudget(1024, 3000)
    budget.fitted(1000)
    assert budget.tokens == 2048
    budget.fitted(1000)  # laid out ahead, when the budget was 1,024
    assert budget.tokens == 2048
    budget.fitted(2000)
    assert budget.tokens == 3000


def test_a_given_budget_does_not_grow(tiny_model: Path) -> None:
    budget = token_budget(100, tiny_model, torch.device("cpu"))
    budget.fitted(100)
    assert budget.tokens == 100


def test_where_it_begins(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_budget(None, tiny_model, torch.device("cuda")).tokens == FIRST
    monkeypatch.setattr(memory, "free_bytes", lambda: 64e9)
    assert token_budget(None, tiny_model, torch.device("cpu")).tokens == CEILING["cpu"]
    # 32 wide: 12 numbers a position and width, 4 bytes each; half of what is free.
    monkeypatch.setattr(memory, "free_bytes", lambda: 2.0 * 100 * 12 * 4 * 32)
    assert token_budget(None, tiny_model, torch.device("cpu")).tokens == 100
    monkeypatch.setattr(memory, "free_bytes", lambda: 0.0)
    assert token_budget(None, tiny_model, torch.device("cpu")).tokens == 1


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_training_has_a_budget_by_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "default_device", lambda _name: torch.device(device))
    config = TrainConfig("model", [], "output")
    assert training_budget(config) == AT_ONCE["cuda" if device == "cuda" else "cpu"]
    assert training_budget(replace(config, token_budget=5)) == 5


def test_free_memory_is_what_the_container_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes() == 8000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() == 8000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert memory.free_bytes() == 1300


@pytest.mark.parametrize(
    ("error", "smaller_may_do"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, smaller_may_do: bool) -> None:
    assert is_out_of_memory(error) is smaller_may_do
