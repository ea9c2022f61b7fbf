"""A kernel that does not work here is found out before its first use, and another one taken."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from layout_oracle import store_of
from oracle import Group
from torch import Tensor

from logratio.data.feed import lay_out
from logratio.logps.attention import SharedPrompt, fused, sdpa
from logratio.logps.attention.kernels import KernelError, Wanted
from logratio.logps.attention.sdpa import Scoring
from logratio.logps.batch import SharedBatch, fields_for, to_torch
from logratio.logps.checks import batch_of
from logratio.logps.sequences import Sequences

CPU = torch.device("cpu")
WANTED = Wanted("cuda", torch.bfloat16, 16, 16, heads=4, key_heads=2)
Kernel = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    fused.failure.cache_clear()
    fused.choose.cache_clear()
    yield
    fused.failure.cache_clear()
    fused.choose.cache_clear()


def groups() -> list[Group]:
    """The lengths that are tried, with other tokens in each."""
    ids = count(3)
    return [
        ([next(ids) for _ in range(prompt)], [[next(ids) for _ in range(n)] for n in answers])
        for prompt, answers in fused.GROUPS
    ]


def row() -> SharedPrompt:
    return SharedPrompt(batch_of(groups(), "shared"))  # type: ignore[arg-type]


def right(_name: str, q: Tensor, k: Tensor, v: Tensor, _row: Any, scoring: Scoring) -> Tensor:
    return sdpa.attend(q, k, v, row(), scoring)


def uncapped(name: str, q: Tensor, k: Tensor, v: Tensor, at: Any, _scoring: Scoring) -> Tensor:
    return right(name, q, k, v, at, Scoring())


def blind(name: str, q: Tensor, k: Tensor, v: Tensor, at: Any, scoring: Scoring) -> Tensor:
    """Completions do not see their prompts."""
    out = right(name, q, k, v, at, scoring)
    return torch.cat([out[:, :70], out[:, 70:].detach() * 0.5], 1)


def slipped(name: str, q: Tensor, k: Tensor, v: Tensor, at: Any, scoring: Scoring) -> Tensor:
    """Right values, and no gradient of the values."""
    return right(name, q, k, v.detach(), at, scoring) + 0 * v.sum()


def empty(name: str, q: Tensor, k: Tensor, v: Tensor, at: Any, scoring: Scoring) -> Tensor:
    return right(name, q, k, v, at, scoring) * torch.nan


def failing(*_arguments: Any) -> Tensor:
    raise ValueError("Invalid block options\nand a hundred lines more")


def tried(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, wanted: Wanted = WANTED) -> str | None:
    monkeypatch.setattr(fused, "attend_in_one_call", kernel)
    return fused.failure("flex", wanted, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_kernel_that_works_is_let_through(
    softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Wanted("cuda", dtype, 16, 16, heads=4, key_heads=2, softcap=softcap)
    assert tried(right, monkeypatch, wanted) is None


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (blind, "its results are wrong here, by "),
        (slipped, "its results are wrong here, by 1"),
        (empty, "its results are wrong here, by nan"),
        (failing, "it fails here: ValueError: Invalid block options"),
    ],
)
def test_a_kernel_that_does_not_is_described_in_a_line(
    kernel: Kernel, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tried(kernel, monkeypatch)
    assert found is not None
    assert found.startswith(reason)
    assert "\n" not in found


def test_a_cap_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Wanted("cuda", torch.float32, 16, 16, softcap=2.0)
    assert "results are wrong" in str(tried(uncapped, monkeypatch, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_that_is_off_by_one_is_seen(
    off: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(name: str, q: Tensor, k: Tensor, v: Tensor, at: Any, scoring: Scoring) -> Tensor:
        window = scoring.window and scoring.window + off
        return right(name, q, k, v, at, dataclasses.replace(scoring, window=window))

    windowed = dataclasses.replace(WANTED, dtype=dtype, windowed=True)
    assert tried(right, monkeypatch, windowed) is None
    fused.failure.cache_clear()
    assert "results are wrong" in str(tried(shifted, monkeypatch, windowed))
    plain = dataclasses.replace(windowed, windowed=False)
    assert tried(shifted, monkeypatch, plain) is None


def test_memory_that_is_short_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        tried(full, monkeypatch)


def test_nothing_of_the_caller_reaches_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def looking(*arguments: Any) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return right(*arguments)

    def refuse(_tensor: Any) -> Any:
        raise AssertionError("a hook of the caller's saw a tensor of the trial")

    random = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(refuse, refuse)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), hooks:
        assert tried(looking, monkeypatch) is None
        assert fused.failure("flex", WANTED, CPU) is None
    assert seen == [(True, False)]
    assert torch.equal(torch.get_rng_state(), random)


def test_the_next_kernel_is_taken_and_the_reason_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "flash3_merged": "its results are wrong here, by 0.3",
        "flash3": "it fails here: RuntimeError: only Hopper GPUs",
        "merged": "its results are wrong here, by 0.3",
        "varlen": "it fails here: RuntimeError: only Ampere GPUs",
    }
    monkeypatch.setattr(fused, "failure", lambda kernel, *_: broken.get(kernel))
    monkeypatch.setattr(fused, "missing_kernels", lambda: (("flash_attn", "not installed"),))
    repeated = dataclasses.replace(WANTED, repeated=True)
    choice = fused.choose(repeated, torch.device("cuda"), None)
    assert choice.name == "flex"
    assert choice.passed_over == (*broken.items(), ("flash_attn", "not installed"))


def test_where_all_fail_the_calls_of_a_cpu_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "failure", lambda *_: "it fails here")
    assert fused.choose(WANTED, torch.device("cuda"), None).name == "sdpa"


def test_what_is_forced_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "failure", lambda *_: "it fails here")
    assert fused.choose(WANTED, torch.device("cuda"), "varlen").name == "varlen"
    with pytest.raises(KernelError):
        fused.choose(Wanted("cpu", torch.bfloat16, 16, 16), CPU, "varlen")


def test_rows_are_laid_out_as_rust_lays_them_out() -> None:
    store = store_of([(p, [(c, [1] * len(c), 2) for c in answers]) for p, answers in groups()])
    arrays = lay_out(store, np.arange(len(fused.GROUPS)), fields=fields_for("shared", "cuda"))
    batch = to_torch(arrays)
    assert isinstance(batch, SharedBatch)
    for field in dataclasses.fields(Sequences):
        own, other = (
            getattr(row, field.name) for row in (fused.row_of(fused.GROUPS, CPU), batch.sequences)
        )
        assert torch.equal(own, other) if isinstance(own, Tensor) else own == other, field.name
