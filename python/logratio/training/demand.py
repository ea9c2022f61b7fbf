"""How much memory and time a pass over tokens takes: counts, and a short measurement."""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from logratio.training.config import Quantization
from logratio.training.fingerprint import parameter_count
from logratio.training.models import base_folder, default_device

FORWARD, TRAIN = 2, 6
"""FLOPs per parameter and token, of scoring and of training (Kaplan et al. 2020, section 2.1)."""
EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a whole model reaches, roughly."""
PROCESS_BYTES = 0.95e9
"""torch, transformers and peft loaded, and the head's tiles."""
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
LIVE, KEPT = 12, 34
"""Numbers per position and width: alive in a layer's pass; kept by a layer for the backward pass
(Korthikanti et al. 2022, arXiv 2205.05198, section 4.1)."""


def flops_per_second(device: str | None) -> float:
    """Measure a matrix product on `device` for a moment."""
    where = default_device(device)
    left = torch.ones(768, 768, device=where)  # random ones would move the seed
    product = left @ left
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        product = left @ left
        count += 1
    float(product[0, 0])  # waits for a GPU
    return 2 * 768**3 * count / (time.perf_counter() - start)


def seconds(model: str | Path, tokens: float, per_parameter: int, device: str | None) -> float:
    """Estimate the time to pass `tokens` through the model in `folder`."""
    flops = per_parameter * parameter_count(model) * tokens
    return flops / (EFFICIENCY * flops_per_second(device))


def training_bytes(model: str | Path, frozen: str | Path | None, trainable_share: float) -> float:
    """Estimate a run's model memory: float32 weights, gradients, two moments, and a reference."""
    count = parameter_count(model)
    reference = 4 * parameter_count(frozen) if frozen else 0
    return count * (4 + 12 * trainable_share) + reference


def scoring_bytes(
    models: Sequence[str | Path], tokens: int, quantization: Quantization | None = None
) -> float:
    """Estimate a scoring pass's memory: weights, the process, one layer of `tokens` positions."""
    weight_bytes = {None: 4.0, "8bit": 1.0, "4bit": 0.5}[quantization]
    weights = weight_bytes * sum(parameter_count(model) for model in models)
    return PROCESS_BYTES + weights + position_bytes(models[0]) * tokens


def position_bytes(model: str | Path) -> float:
    """Estimate the bytes that one position takes in a pass without gradients, in float32."""
    _, width = _shape(model)
    return 4.0 * LIVE * width


def free_bytes() -> float:
    """Return the memory that this process may still take: of the machine, and of its container."""
    free = [_machine_free()]
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free.append(float(most) - float(used.read_text()) + _reclaimable())
    return max(0.0, min(free))


def _machine_free() -> float:
    """Read what the kernel can hand out; half of all memory where it does not say."""
    if _MEMINFO.exists() and (found := re.search(r"MemAvailable:\s+(\d+)", _MEMINFO.read_text())):
        return 1024.0 * int(found[1])
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reclaimable() -> float:
    """Read how much of a container's memory is files that can be read again."""
    found = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.M)
    return float(found[1]) if found else 0.0


def free_on(device: torch.device) -> float:
    """Return what this process may still take on `device`, with what its allocator holds unused."""
    if device.type != "cuda":
        return free_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + unused)


def kept_bytes(model: str | Path, *, twice: bool = False) -> float:
    """Estimate the bytes that one token's activations take until the backward pass, in float32.

    With all layers computed `twice`, that is their inputs, and what one of them keeps.
    """
    layers, width = _shape(model)
    return 4.0 * width * (layers + KEPT if twice else KEPT * layers)


def _shape(model: str | Path) -> tuple[int, int]:
    """Read a model's layers and width."""
    config = json.loads((base_folder(model) / "config.json").read_text())
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 12
    width = config.get("hidden_size") or config.get("n_embd") or 768
    return int(layers), int(width)
