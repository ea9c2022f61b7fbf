"""Process-wide settings: float32 products, deterministic kernels, CUDA's allocator."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.training import PrecomputeConfig, TrainConfig, precompute, train
from logratio.training import reference_scorer as scorer_module
from logratio.training import update as update_module
from logratio.training.torch_settings import (
    ALLOCATOR,
    CUBLAS,
    ask_for_expandable_segments,
    exact_products,
    fixed_order,
)

CUDA = torch.device("cuda")
BACKENDS: Any = torch.backends
MATMULS = BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul
FILLS: Any = torch.utils.deterministic


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(tiny_model, [pairs_file], tmp_path / "out", batch_size=8, save_every=0)


def precisions() -> list[str]:
    return [BACKENDS.fp32_precision, *(matmul.fp32_precision for matmul in MATMULS)]


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"
    for matmul in MATMULS:  # "highest" has made them explicit
        matmul.fp32_precision = "none"


def set_legacy() -> None:
    torch.set_float32_matmul_precision("medium")


def set_old_flag() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True


def set_one() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def set_all() -> None:
    BACKENDS.fp32_precision = "tf32"


def set_half_back() -> None:
    torch.set_float32_matmul_precision("high")
    BACKENDS.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "round_products", [set_legacy, set_old_flag, set_one, set_all, set_half_back]
)
def test_rounded_products_are_off_inside_and_back_after(
    round_products: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    round_products()
    before = precisions()
    with pytest.raises(KeyError), exact_products():
        assert {matmul.fp32_precision for matmul in MATMULS} == {"ieee"}
        # What compilers ask; torch raises where old and new switches contradict each other.
        assert torch.get_float32_matmul_precision() == "highest"
        assert BACKENDS.cuda.matmul.allow_tf32 is False
        raise KeyError
    assert precisions() == before
    assert "disabled while logratio computes" in capsys.readouterr().err


def test_exact_products_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = precisions()
    with exact_products():
        assert precisions() == before
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("restored")
def test_every_pass_of_train_and_precompute_multiplies_exactly(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def noting(function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append(BACKENDS.cuda.matmul.fp32_precision)
            return function(*args, **kwargs)

        return noted

    for module, name in ((scorer_module, "score"), (update_module, "completion_loss")):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    BACKENDS.cuda.matmul.allow_tf32 = True
    cache = tmp_path / "cache"
    precompute(PrecomputeConfig(config.model, config.data, cache), show_progress=False)
    scored = len(seen)
    train(dataclasses.replace(config, cache=cache), show_progress=False)
    assert 0 < scored < len(seen)
    assert set(seen) == {"ieee"}
    assert BACKENDS.cuda.matmul.allow_tf32 is True


def test_a_fixed_order_is_for_gpus_that_are_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    for device, wanted in ((CUDA, False), (torch.device("cpu"), True)):
        with fixed_order(device, wanted=wanted):
            assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), fixed_order(CUDA, wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention asks this
        assert os.environ[CUBLAS] == ":4096:8"
        assert not FILLS.fill_uninitialized_memory
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert FILLS.fill_uninitialized_memory
    assert CUBLAS not in os.environ


REFUSED = ("put", "histc", "bincount", "scatter_reduce", "kthvalue", "median", "nll_loss2d")
"""Operations that a model or loss could use, and that torch refuses in deterministic mode."""


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name.partition("::")[2].strip("_"))
        return func(*args, **(kwargs or {}))


def test_an_update_has_no_operation_without_a_deterministic_kernel(config: TrainConfig) -> None:
    with Operations() as seen:
        train(config, show_progress=False)
    assert {"index_add", "embedding_dense_backward", "mm"} <= seen.names  # the backward pass too
    assert not seen.names & set(REFUSED)


@pytest.mark.parametrize(
    ("device", "own", "asked"),
    [
        (None, None, True),
        ("cuda:1", None, True),
        ("cpu", None, False),
        (None, "PYTORCH_ALLOC_CONF", False),
        (None, "PYTORCH_CUDA_ALLOC_CONF", False),
    ],
)
def test_expandable_segments_are_enabled_unless_the_user_set_the_allocator(
    device: str | None, own: str | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "max_split_size_mb:64") if name == own else monkeypatch.delenv(
            name, raising=False
        )
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    ask_for_expandable_segments(device)  # no GPU is here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as started:
        started.setattr(torch.cuda, "is_initialized", lambda: True)
        ask_for_expandable_segments(device)
    assert {name: os.environ.get(name) for name in ALLOCATOR} == before
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    ask_for_expandable_segments(device)
    assert (os.environ.get(ALLOCATOR[0]) == "expandable_segments:True") == asked
    monkeypatch.delenv(ALLOCATOR[0], raising=False)


def test_importing_changes_nothing() -> None:
    code = (
        "import os, torch; before = dict(os.environ)\n"
        "import logratio.training, logratio.training.trainer\n"
        "assert dict(os.environ) == before, set(os.environ) - set(before)\n"
        "assert not torch.are_deterministic_algorithms_enabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
