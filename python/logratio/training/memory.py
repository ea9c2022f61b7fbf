"""How much memory and time a pass takes, and how many tokens are computed at a time."""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from logratio._rust import Store
from logratio.errors import LogratioError
from logratio.forecast import Forecast
from logratio.logps.head import gpu_free_bytes
from logratio.training.config import Precision, Quantization, TrainConfig
from logratio.training.fingerprint import parameter_count
from logratio.training.models import (
    AT_ONCE,
    base_folder,
    default_device,
    precision_note,
    precision_of,
    training_budget,
    weights_dtype,
)
from logratio.training.optimizers import gradient_bytes, state_bytes
from logratio.training.validation import reference_kind

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


FIRST = 2**12
"""What a GPU begins with: there is room for it beside any model that fits; the rest is found."""
CEILING = {"cpu": AT_ONCE["cpu"], "cuda": 2**18}
"""Where larger stops paying. On a CPU the caches are full: two small models were fastest from 1,024
to 4,096 tokens, and a fifth slower at 16,384."""
MEMORY_SHARE = 0.5
"""Of the memory that is free, what activations may take on a CPU: a forecast is no promise."""
PHRASES = ("out of memory", "can't allocate memory", "not enough memory")
"""How torch says so where the error's type does not."""


class MemoryShortageError(LogratioError, RuntimeError):
    """Not even one group fits in memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an error that a smaller batch may avoid from every other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in PHRASES)


class TokenBudget:
    """The largest batch that is believed to fit; it learns from every batch.

    Attributes:
        tokens: computed at a time.
        ceiling: never more than this.
    """

    def __init__(self, tokens: int, ceiling: int | None = None) -> None:
        self.tokens, self.ceiling = tokens, ceiling or tokens

    def fitted(self, tokens: int) -> None:
        """Note that a batch fitted; try twice as many once the budget itself was tried."""
        if 2 * tokens > self.tokens:
            self.tokens = min(2 * self.tokens, self.ceiling)

    def exceeded(self, tokens: int) -> None:
        """Note that a batch did not fit: from now on half of it."""
        self.tokens = self.ceiling = max(1, min(tokens, self.tokens) // 2)


def token_budget(given: int | None, model: str | Path, device: torch.device) -> TokenBudget:
    """Return `given`, or where to begin to look: low on a GPU, and what is free on a CPU."""
    if given is not None:
        return TokenBudget(given)
    ceiling = CEILING.get(device.type, CEILING["cpu"])
    if device.type == "cuda":
        return TokenBudget(FIRST, ceiling)
    fits = int(MEMORY_SHARE * free_bytes() / position_bytes(model))
    return TokenBudget(max(1, min(ceiling, fits)))


TREE_AT_ONCE = 2**14
"""Groups of which the first are tried for the next micro-batch of a tree."""


class GroupQueue:
    """Groups that wait to be scored, the longest first: what does not fit shows at once.

    In the tree layout those that share a beginning are neighbours, and short ones may come first.

    Attributes:
        groups: int64, in the order in which they are scored.
        position: how many of them were taken.
    """

    def __init__(self, store: Store, groups: np.ndarray, layout: str) -> None:
        """Queue `groups`, int64, for micro-batches in `layout`."""
        self.position, self._store, self._layout = 0, store, layout
        if layout == "tree":
            self.groups = store.tree_order(groups)
            return
        lengths = store.shared_lengths() if layout == "shared" else _padded_widths(store)
        lengths = lengths[groups].astype(np.int64)
        order = np.argsort(-lengths, kind="stable")
        self.groups, self._widths = groups[order], lengths[order]
        sizes = np.diff(store.completion_offsets())[self.groups]
        self._ends = np.cumsum(self._widths if layout == "shared" else sizes)

    def __len__(self) -> int:
        return len(self.groups) - self.position

    def take(self, budget: int) -> np.ndarray:
        """Return the next groups that have `budget` tokens together, and one at least."""
        start = self.position
        if self._layout == "tree":
            waiting = self.groups[start : start + TREE_AT_ONCE]
            self.position += self._store.tree_fit(waiting, budget)
            return self.groups[start : self.position]
        before = self._ends[start - 1] if start else 0
        # The first row is the widest, and all rows are padded to it.
        room = budget if self._layout == "shared" else budget // self._widths[start]
        stop = int(np.searchsorted(self._ends, before + room, side="right"))
        self.position = max(start + 1, stop)
        return self.groups[start : self.position]


def _padded_widths(store: Store) -> np.ndarray:
    """Return the tokens of each group's longest row."""
    offsets = store.completion_offsets()
    longest = np.maximum.reduceat(store.completion_lengths(), offsets[:-1])
    widths: np.ndarray = store.prompt_lengths() + longest
    return widths
