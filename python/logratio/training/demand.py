"""How much memory and time a pass over tokens takes: counts, and a short measurement."""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from logratio._rust import Store
from logratio.forecast import Forecast
from logratio.logps.tiles import gpu_free_bytes
from logratio.training.config import Precision, Quantization, TrainConfig
from logratio.training.fingerprint import parameter_count
from logratio.training.models import (
    base_folder,
    default_device,
    precision_note,
    precision_of,
    training_budget,
    weights_dtype,
)
from logratio.training.optimizers import gradient_bytes, state_bytes
from logratio.training.setup import reference_kind

FORWARD, TRAIN = 2, 6
"""FLOPs per parameter and token, of scoring and of training (Kaplan et al. 2020, section 2.1)."""
PRODUCT = {"cpu": 768, "cuda": 8_192}
"""Rows of the square matrices that are multiplied to measure a device: enough to be busy. On a GPU
a product of 768 takes as long as its launch."""
EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a whole model reaches, roughly."""
PROCESS_BYTES = 0.95e9
"""torch, transformers and peft loaded, and the head's tiles."""
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
LIVE, KEPT = 12, 34
"""Numbers per position and width: alive in a layer's pass; kept by a layer for the backward pass
(Korthikanti et al. 2022, arXiv 2205.05198, section 4.1)."""


def flops_per_second(device: str | None, precision: Precision = "fp32") -> float:
    """Measure a matrix product on `device` for a moment, in the dtype of the run's products."""
    where = default_device(device)
    size = PRODUCT.get(where.type, PRODUCT["cpu"])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left = torch.ones(size, size, device=where, dtype=dtype)  # random ones would move the seed
    float((left @ left)[0, 0])  # a GPU waits for its library to start
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        # Each product waits: a queue that is not waited for would be as long as the GPU is slow.
        float((left @ left)[0, 0])
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def seconds(
    model: str | Path,
    tokens: float,
    per_parameter: int,
    device: str | None,
    precision: Precision = "fp32",
) -> float:
    """Estimate the time to pass `tokens` through the model in `folder`."""
    flops = per_parameter * parameter_count(model) * tokens
    return flops / (EFFICIENCY * flops_per_second(device, precision))


def training_forecast(config: TrainConfig, store: Store) -> Forecast:
    """Estimate what a training run needs; its memory is that of the device."""
    kind = reference_kind(config)
    frozen = (config.reference or config.model) if kind == "frozen" else None
    lengths = store.shared_lengths()
    tokens = float(lengths.sum()) * config.epochs
    longest = int(lengths.max())
    at_once = min(max(training_budget(config), longest), config.batch_size * longest)
    twice = config.activation_checkpointing == "all"
    precision = precision_of(config)
    work = seconds(config.model, tokens, TRAIN + FORWARD * twice, config.device, precision)
    if kind in ("adapter", "frozen"):
        other = frozen or config.model
        work += seconds(other, tokens, FORWARD, config.device, precision)
    weights = _weight_bytes(config) * parameter_count(config.model) * _trained(config)
    kept = kept_bytes(config.model, precision, twice=twice)
    return Forecast(
        memory_bytes=PROCESS_BYTES
        + training_bytes(config, frozen, added_up=not fits_at_once(config, store))
        + at_once * kept,
        disk_bytes=weights + (_checkpoint_bytes(config) if config.save_every else 0),
        disk_path=Path(config.output),
        seconds=work,
        notes=f"reference {kind}, {tokens:,.0f} tokens, {precision_note(config)}",
    )


def fits_at_once(config: TrainConfig, store: Store) -> bool:
    """Tell whether every update is one micro-batch: the longest groups of one fit together."""
    lengths = np.sort(store.shared_lengths())[-config.batch_size :]
    return int(lengths.sum()) <= training_budget(config)


def training_bytes(
    config: TrainConfig, frozen: str | Path | None, *, added_up: bool = True
) -> float:
    """Estimate what a run's models take on its device: weights, gradients, states, a reference.

    Args:
        config: of the run: precision, optimizer and adapters decide the bytes a weight.
        frozen: folder of a reference that is held beside the policy.
        added_up: whether updates have several micro-batches, whose gradients are added up.
    """
    count, precision = parameter_count(config.model), precision_of(config)
    dtype = torch.float32 if config.lora else weights_dtype(precision)
    states = state_bytes(config.optimizer, dtype, default_device(config.device))
    own = gradient_bytes(dtype, added_up=added_up) + states
    weights = (
        frozen_bytes(config.model, precision)
        if config.lora
        else count * weights_dtype(precision).itemsize
    )
    reference = frozen_bytes(frozen, precision) if frozen else 0
    return weights + count * own * _trained(config) + reference


def frozen_bytes(model: str | Path, precision: Precision) -> float:
    """Estimate what the weights of a model that is not trained take, in bytes.

    Under bf16 they are held in bfloat16, but for the embeddings: see `held_in_bfloat16`.
    """
    count = parameter_count(model)
    if precision != "bf16":
        return float(count * weights_dtype(precision).itemsize)
    config = json.loads((base_folder(model) / "config.json").read_text())
    embeddings = int(config.get("vocab_size", 0)) * _shape(model)[1]
    return 2.0 * (count + min(count, embeddings))


def _weight_bytes(config: TrainConfig) -> float:
    return float(weights_dtype(precision_of(config)).itemsize)


def _trained(config: TrainConfig) -> float:
    """Return the share of the weights that train, roughly."""
    return 0.01 if config.lora else 1.0


def _checkpoint_bytes(config: TrainConfig) -> float:
    """Estimate the two checkpoints that are kept and the one being written: weights and states."""
    dtype = torch.float32 if config.lora else weights_dtype(precision_of(config))
    each = dtype.itemsize + state_bytes(config.optimizer, dtype, torch.device("cpu"))
    return 3 * each * parameter_count(config.model) * _trained(config)


def scoring_bytes(
    models: Sequence[str | Path],
    tokens: int,
    quantization: Quantization | None = None,
    precision: Precision = "fp32",
) -> float:
    """Estimate a scoring pass's memory: weights, the process, one layer of `tokens` positions."""
    if quantization is None:
        weights = sum(frozen_bytes(model, precision) for model in models)
    else:
        each = {"8bit": 1.0, "4bit": 0.5}[quantization]
        weights = each * sum(parameter_count(model) for model in models)
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
    return gpu_free_bytes(device) if device.type == "cuda" else free_bytes()


def kept_bytes(model: str | Path, precision: Precision = "fp32", *, twice: bool = False) -> float:
    """Estimate the bytes that one token's activations take until the backward pass.

    With all layers computed `twice`, that is their inputs, and what one of them keeps. Autocast is
    counted as float32: it keeps some of each, and copies of the weights.
    """
    layers, width = _shape(model)
    return weights_dtype(precision).itemsize * width * (layers + KEPT if twice else KEPT * layers)


def _shape(model: str | Path) -> tuple[int, int]:
    """Read a model's layers and width."""
    config = json.loads((base_folder(model) / "config.json").read_text())
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 12
    width = config.get("hidden_size") or config.get("n_embd") or 768
    return int(layers), int(width)
