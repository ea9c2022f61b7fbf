"""How much memory and time a pass over tokens takes: counts, and a short measurement."""

import time
from pathlib import Path

import torch

from logratio.training.fingerprint import parameter_count
from logratio.training.models import default_device

FORWARD, TRAIN = 2, 6
"""FLOPs per parameter and token, of scoring and of training (Kaplan et al. 2020, section 2.1)."""
EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a whole model reaches, roughly."""


def flops_per_second(device: str | None) -> float:
    """Measure a matrix product on `device` for a moment."""
    where = default_device(device)
    left = torch.randn(768, 768, device=where)
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
