"""Forecasts of time: a device is measured as the run will use it."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.training import memory
from logratio.training.config import Precision


class Products(TorchDispatchMode):
    """Records the dtype and size of each matrix product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[torch.dtype, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.seen.add((args[0].dtype, len(args[0])))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def measured_anew() -> Iterator[None]:
    """A process measures a device once; each test measures it again."""
    measure = memory.flops_per_second
    measure.cache_clear()
    yield
    measure.cache_clear()


def test_a_process_measures_a_device_once() -> None:
    assert memory.flops_per_second("cpu") == memory.flops_per_second("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("bf16-weights", torch.bfloat16)],
)
def test_a_device_is_measured_in_the_run_s_dtype(precision: Precision, dtype: torch.dtype) -> None:
    with Products() as products:
        assert memory.flops_per_second("cpu", precision) > 0
    assert products.seen == {(dtype, 768)}


def test_a_gpu_is_measured_at_a_size_that_keeps_it_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is chosen by the device's kind; here a small one takes the place of 8,192."""
    assert memory.PRODUCT["cuda"] == 8_192
    monkeypatch.setitem(memory.PRODUCT, "cpu", 32)
    with Products() as products:
        memory.flops_per_second("cpu")
    assert products.seen == {(torch.float32, 32)}


def test_every_product_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts looks: three looks are two products after the first."""
    ticks = itertools.count()
    monkeypatch.setattr(memory.time, "perf_counter", lambda: 0.06 * next(ticks))  # type: ignore[attr-defined]
    assert memory.flops_per_second("cpu") == pytest.approx(2 * 768**3 / 0.18)


def test_a_forecast_takes_the_precision(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"fp32": 1.0, "bf16": 30.0}
    monkeypatch.setattr(memory, "flops_per_second", lambda _device, precision: speeds[precision])
    slow = memory.seconds(tiny_model, 10, memory.TRAIN, "cpu")
    assert slow == pytest.approx(30 * memory.seconds(tiny_model, 10, memory.TRAIN, "cpu", "bf16"))
