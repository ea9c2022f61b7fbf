"""Settings of torch that belong to the whole process, and what our passes need of them."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import silu

from logratio.progress import say

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What users set; torch reads the second only where the first is missing."""
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
ROUNDED = ("tf32", "bf16")
"""What torch may round the inputs of a float32 product to."""


def ask_for_expandable_segments(device: str | None) -> None:
    """Let CUDA's allocator grow its blocks, before its first allocation.

    Micro-batches of many lengths split fixed blocks until none is large enough. The setting stays
    in the environment of the process. One that the user made is left alone, and so is a process
    that has started CUDA already, where it would do nothing.

    Args:
        device: of the command; None: a GPU where there is one.
    """
    on_gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    if on_gpu and not torch.cuda.is_initialized() and not any(map(os.environ.get, ALLOCATOR)):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 numbers as float32 inside the block, whatever the process had asked for.

    TF32 and bfloat16 products round float32 inputs to 10 and 7 bits: log-probs that say float32
    would not be, and transformers makes the angles of rotary positions by such a product, so that
    positions above 2,048 would move under every precision. Says so where it changes something.
    """
    backends: Any = torch.backends
    matmuls = backends.cuda.matmul, backends.mkldnn.matmul
    before = [matmul.fp32_precision for matmul in matmuls]
    if not set(before) & set(ROUNDED):
        yield
        return
    say(
        f"this process rounds float32 products to {next(b for b in before if b in ROUNDED)}: that "
        "is off while logratio computes"
    )
    everything, legacy = backends.fp32_precision, _legacy_precision()
    try:
        if legacy is None:
            backends.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        backends.fp32_precision = everything
        for matmul, own in zip(matmuls, before, strict=True):
            matmul.fp32_precision = "none" if own == everything else own


def _legacy_precision() -> str | None:
    """Return what `torch.set_float32_matmul_precision` was given; None where newer switches hold.

    torch refuses to answer where a process used both, and so would what it compiles.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def fixed_order(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Use deterministic kernels inside the block where that is `wanted` and `device` is a GPU.

    The switch alone makes torch's attention kernels add up their gradients in a fixed order, and
    flash-attn is handed it. Kernels of a CPU are deterministic in any case.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    settings: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    warns, workspace = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        os.environ.get(CUBLAS),
    )
    os.environ.setdefault(CUBLAS, ":4096:8")  # torch demands it of whoever wants the same bits
    torch.use_deterministic_algorithms(True)
    # Only code that reads memory before it writes it would gain by this.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        settings.fill_uninitialized_memory = fills
        if workspace is None:
            os.environ.pop(CUBLAS, None)


SLOWER = 1.5
"""Advice is given when all threads take this many times as long as one."""


def advice(device: torch.device) -> str | None:
    """Measure small operations for a moment; say where torch's threads hurt, else None."""
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        return None
    together = _seconds()
    torch.set_num_threads(1)
    alone = _seconds()
    torch.set_num_threads(count)
    if together < SLOWER * alone:
        return None
    return (
        f"torch's {count} threads take {together / alone:.1f} times as long as one here: the "
        "machine is busy or has fewer cores than it says; set OMP_NUM_THREADS=1"
    )


def _seconds() -> float:
    """Time a layer's worth of small operations: the median of twenty."""
    left, right = torch.ones(512, 192), torch.ones(192, 512)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        silu(left @ right).sum()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
