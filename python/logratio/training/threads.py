"""Threads that wait for each other: on a crowded machine, two can be 200 times slower than one."""

import time

import torch
from torch.nn.functional import silu

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
