"""Memory of a worker: resident pages on the CPU, the allocator's count on a GPU (untested).

The memory above the model is the peak between the first and the last update, minus the memory with
only the policy loaded. It includes gradients, the optimizer's moments, a reference in memory,
activations and logits. Every arm is measured in the same way.
"""

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MOMENT_BYTES = 8  # AdamW's two moments of one float32 weight


def status_bytes(name: str) -> int:
    """Read a field of this process's status, `VmRSS` or `VmHWM`, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}")


class Memory:
    """One worker's memory: with its policy, before its updates, at their peak; bytes."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self.policy = self.before = self.peak = self.reserved = 0
        self.is_reset = False

    def mark_policy(self) -> None:
        """Record the memory with only the policy, after returning freed memory to the system."""
        gc.collect()
        if self.is_cuda:
            self.policy = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        self.policy = status_bytes("VmRSS")

    def begin(self) -> None:
        """Record the peak so far, and reset it for the updates."""
        if self.is_cuda:
            self.before = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.is_reset = True
            return
        self.before = status_bytes("VmHWM")
        try:
            CLEAR.write_text("5")
            self.is_reset = True
        except OSError as error:
            print(f"the peak includes what came before the updates: {error}")

    def end(self) -> None:
        """Record the peak of the updates."""
        if self.is_cuda:
            self.peak = torch.cuda.max_memory_allocated()
            self.reserved = torch.cuda.max_memory_reserved()
        else:
            self.peak = status_bytes("VmHWM")

    def report(self, parameters: int) -> dict[str, Any]:
        """Return all measurements, for a policy with this number of trained float32 weights."""
        above = self.peak - self.policy
        return {
            "policy": self.policy,
            "peak_before_updates": self.before,
            "peak": self.peak,
            "reserved": self.reserved,
            "peak_is_of_updates_only": self.is_reset,
            "above_model": above,
            "above_model_and_moments": above - MOMENT_BYTES * parameters,
        }
