"""Process-wide settings of torch: allocator, float32 precision, determinism, threads."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import silu

from logratio.progress import say

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Allocator settings of the user; torch reads the second only if the first is not set."""
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
ROUNDED = ("tf32", "bf16")
"""Precisions to which torch may round the inputs of float32 products."""


def ask_for_expandable_segments(device: str | None) -> None:
    """Enable expandable segments in CUDA's allocator, before its first allocation.

    Micro-batches of varying lengths fragment blocks of fixed size. The setting is written to the
    environment of the process. It is not changed if the user has set it, or if CUDA is already
    initialized, when it would have no effect.

    Args:
        device: Device of the command; None: a GPU if available.
    """
    on_gpu = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    if on_gpu and not torch.cuda.is_initialized() and not any(map(os.environ.get, ALLOCATOR)):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products in full precision inside the block.

    TF32 and bfloat16 products round float32 inputs to 10 and 7 bits. Float32 log-probs would be
    inexact, and so would rotary embeddings beyond position 2,048 under every precision, because
    transformers computes their angles by a float32 product. Prints a note if a setting changes.
    """
    backends: Any = torch.backends
    matmuls = backends.cuda.matmul, backends.mkldnn.matmul
    before = [matmul.fp32_precision for matmul in matmuls]
    if not set(before) & set(ROUNDED):
        yield
        return
    say(
        f"this process rounds float32 products to {next(b for b in before if b in ROUNDED)}: "
        "disabled while logratio computes"
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
    """Return the setting of `torch.set_float32_matmul_precision`; None if newer settings apply.

    torch raises an error if a process has used both, and so would compiled code.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def fixed_order(device: torch.device, *, wanted: bool) -> Iterator[None]:
    """Use deterministic kernels inside the block if `wanted` and `device` is a GPU.

    torch's attention kernels then accumulate gradients in a fixed order; the setting is also passed
    to flash-attn. CPU kernels are always deterministic.
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
    os.environ.setdefault(CUBLAS, ":4096:8")  # required by torch for deterministic cuBLAS
    torch.use_deterministic_algorithms(True)
    # Filling new memory costs time, and only helps code that reads uninitialized memory.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        settings.fill_uninitialized_memory = fills
        if workspace is None:
            os.environ.pop(CUBLAS, None)


SLOWER = 1.5
"""Advice is given if all threads together take this many times as long as one."""


def advice(device: torch.device) -> str | None:
    """Return advice if several threads are slower than one for small operations, else None."""
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
        f"torch's {count} threads take {together / alone:.1f} times as long as one thread: the "
        "machine is busy or has fewer cores than it reports; set OMP_NUM_THREADS=1"
    )


def _seconds() -> float:
    """Return the median time of twenty small matrix products, in seconds."""
    left, right = torch.ones(512, 192), torch.ones(192, 512)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        silu(left @ right).sum()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
