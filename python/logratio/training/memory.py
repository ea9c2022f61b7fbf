"""Estimates of the memory and time of a pass, and the number of tokens computed at a time."""

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logratio._rust import Store
from logratio.errors import LogratioError
from logratio.forecast import Forecast, count
from logratio.logps.head import gpu_free_bytes
from logratio.training.config import EvaluateConfig, Precision, Quantization, TrainConfig
from logratio.training.fingerprint import parameter_count, tensor_shapes
from logratio.training.models import (
    AT_ONCE,
    base_folder,
    default_device,
    is_quantized,
    precision_note,
    precision_of,
    training_budget,
    weights_dtype,
)
from logratio.training.optimizers import gradient_bytes, state_bytes
from logratio.training.router_loss import router_coefficient
from logratio.training.schedule import RunLength
from logratio.training.validation import reference_kind

FORWARD, TRAIN = 2, 6
"""FLOPs per parameter and token of scoring and training (Kaplan et al. 2020, section 2.1)."""
PRODUCT = {"cpu": 768, "cuda": 8_192}
"""Size of the square matrices multiplied to measure a device, large enough to keep it busy. On a
GPU, a product of 768 takes no longer than its launch."""
EFFICIENCY = 0.5
"""Approximate speed of a whole model as a share of a large matrix product's speed."""
READ = {"cpu": 1e10, "cuda": 1.5e12}
"""Bytes of weights that a device reads per second, approximately."""
LAYER_STEP = 1e-3
"""Seconds that transformers needs for a layer of one step of generation apart from its products,
measured on a CPU."""
PROCESS_BYTES = 0.95e9
"""Memory of the process with torch, transformers and peft imported, and of the head's tiles."""
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
LIVE, KEPT = 12, 34
"""Values per position and unit of width: live during a layer's forward pass, and kept by a layer
for the backward pass (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1)."""


@cache
def flops_per_second(device: str | None, precision: Precision = "fp32") -> float:
    """Measure the speed of a matrix product on `device` for 0.1 s, in the dtype of the run.

    Later calls of the process return the first measurement.
    """
    where = default_device(device)
    size = PRODUCT.get(where.type, PRODUCT["cpu"])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left = torch.ones(size, size, device=where, dtype=dtype)  # torch.rand would advance the RNG
    float((left @ left)[0, 0])  # warm-up: the first product loads cuBLAS
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        # float() synchronizes; without it, the loop would only count kernel launches.
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
    """Estimate the time to process `tokens` with a model, in seconds.

    Args:
        model: Folder of the model.
        tokens: Number of tokens.
        per_parameter: FLOPs per parameter and token: `FORWARD` or `TRAIN`.
        device: Device of the pass; None: the default.
        precision: Precision of the pass.
    """
    flops = per_parameter * parameter_count(model) * tokens
    return flops / (EFFICIENCY * flops_per_second(device, precision))


def training_forecast(config: TrainConfig, store: Store, held_out: Store | None = None) -> Forecast:
    """Estimate the needs of a training run; the memory is that of its device.

    Args:
        config: Settings of the run.
        store: The groups to train on.
        held_out: Held-out groups, or None. Their scores and the samples count.
    """
    kind = reference_kind(config)
    frozen = (config.reference or config.model) if kind == "frozen" else None
    lengths = store.shared_lengths()
    tokens = float(lengths.mean()) * RunLength.of(config, len(store)).groups
    longest = -(-int(lengths.max()) // config.context_parallel_size)
    at_once = min(max(training_budget(config), longest), config.batch_size * longest)
    twice = config.activation_checkpointing == "all"
    precision = precision_of(config)
    work = seconds(config.model, tokens, TRAIN + FORWARD * twice, config.device, precision)
    if kind in ("adapter", "frozen"):
        other = frozen or config.model
        work += seconds(other, tokens, FORWARD, config.device, precision)
    evaluated = ""
    if held_out:
        work += _held_out_seconds(config, held_out, _evaluations(config, len(store)), kind)
        evaluated = f", {count(_evaluations(config, len(store)), 'evaluation')}"
        if config.eval_samples:
            evaluated += f" with {count(config.eval_samples, 'sample')}"
    if not fits_at_once(config, store) and router_coefficient(config):  # the pass that counts
        work += seconds(config.model, tokens, FORWARD, config.device, precision)
    weights = _weight_bytes(config) * parameter_count(config.model) * _trained(config)
    kept = kept_bytes(config.model, precision, twice=twice)
    return Forecast(
        memory_bytes=PROCESS_BYTES
        + training_bytes(config, frozen, added_up=not fits_at_once(config, store))
        + at_once * kept,
        disk_bytes=weights + (_checkpoint_bytes(config) if config.save_every else 0),
        disk_path=Path(config.output),
        seconds=work,
        notes=f"{_reference_note(config, kind)}, {tokens:,.0f} tokens{evaluated}, "
        f"{precision_note(config)}",
    )


_REFERENCES = {
    "none": "no reference",
    "uniform": "a uniform reference",
    "cached": "the reference's log-probs from the cache",
    "adapter": "the reference is the model without its adapters",
    "frozen": "a second model in memory as the reference",
}


def _reference_note(config: TrainConfig, kind: str) -> str:
    if kind == "adapter" and config.adapter == "continue":
        return "the reference is the adapter at its start"
    return _REFERENCES[kind]


def _held_out_seconds(config: TrainConfig, store: Store, times: int, kind: str) -> float:
    """Estimate the time of all evaluations of held-out groups during a run, in seconds.

    The reference scores the groups once and samples once.
    """
    where = config.device, precision_of(config)
    reference = config.reference or config.model
    tokens = float(store.shared_lengths().sum())
    total = times * seconds(config.model, tokens, FORWARD, *where)
    if kind in ("adapter", "frozen"):
        total += seconds(reference, tokens, FORWARD, *where)
    if not config.eval_samples:
        return total
    drawn = sampled_tokens(store, config.eval_samples, config.max_new_tokens)
    total += times * sampling_seconds(config.model, drawn, config.max_new_tokens, *where)
    total += times * seconds(config.model, drawn, FORWARD, *where)
    if kind != "none":
        total += sampling_seconds(reference, drawn, config.max_new_tokens, *where)
        total += times * seconds(reference, drawn, FORWARD, *where)
    return total


def evaluation_seconds(config: EvaluateConfig, store: Store, tokens: float) -> float:
    """Estimate the time to score groups with policy and reference and to sample, in seconds.

    Args:
        config: Settings of the evaluation.
        store: The held-out groups.
        tokens: Tokens that each model computes to score them.
    """
    where = config.device, precision_of(config)
    drawn = sampled_tokens(store, config.samples, config.max_new_tokens)
    total = sum(seconds(model, tokens + drawn, FORWARD, *where) for model in config.models)
    samplers = config.models if config.samples_file else config.models[:1]
    if config.samples:
        total += sum(sampling_seconds(m, drawn, config.max_new_tokens, *where) for m in samplers)
    return total


def sampled_tokens(store: Store, samples: int, max_new_tokens: int) -> float:
    """Return the tokens of samples with their prompts, if none stops early."""
    return samples * (float(store.prompt_lengths().mean()) + max_new_tokens)


def sampling_seconds(
    model: str | Path,
    tokens: float,
    steps: int,
    device: str | None,
    precision: Precision = "fp32",
) -> float:
    """Estimate the time to sample completions together, one token of each per step, in seconds.

    Args:
        model: Folder of the model.
        tokens: Number of tokens of all prompts and completions.
        steps: Maximum length of a completion.
        device: Device of the pass; None: the default.
        precision: Precision of the pass.
    """
    speed = READ.get(default_device(device).type, READ["cpu"])
    reading = steps * frozen_bytes(model, precision) / speed
    layers, _ = _shape(base_folder(model))
    return max(seconds(model, tokens, FORWARD, device, precision), reading) + (
        steps * layers * LAYER_STEP
    )


def _evaluations(config: TrainConfig, groups: int) -> int:
    """Return the number of evaluations of a run over `groups` groups that does not stop early."""
    length = RunLength.of(config, groups)
    every = config.eval_every or math.ceil(groups / config.batch_size)
    return math.ceil(length.updates / every)


def fits_at_once(config: TrainConfig, store: Store) -> bool:
    """Return whether every update is one micro-batch, that is, its longest groups fit together."""
    lengths = np.sort(store.shared_lengths())[-config.batch_size :]
    return int(lengths.sum()) <= training_budget(config)


def training_bytes(
    config: TrainConfig, frozen: str | Path | None, *, added_up: bool = True
) -> float:
    """Estimate the bytes of weights, gradients and optimizer states, and of a frozen reference.

    Args:
        config: Settings of the run; precision, optimizer and adapters determine the size.
        frozen: Folder of a reference that is in memory with the policy, or None.
        added_up: Whether updates accumulate gradients over several micro-batches.
    """
    count, precision = parameter_count(config.model), precision_of(config)
    dtype = torch.float32 if config.trains_adapter else weights_dtype(precision)
    states = state_bytes(config.optimizer, dtype, default_device(config.device))
    own = gradient_bytes(dtype, added_up=added_up) + states
    if config.trains_adapter:  # adapters are further weights
        own += dtype.itemsize
    weights = (
        frozen_bytes(config.model, precision, config.quantization)
        if config.trains_adapter
        else count * weights_dtype(precision).itemsize
    )
    reference = frozen_bytes(frozen, precision, config.quantization) if frozen else 0
    return weights + count * own * _trained(config) + reference


SCALE_BYTES: Mapping[Quantization, float] = {"8bit": 0.0, "4bit": 4 / 64}
"""Bytes of scales per quantized weight. A float32 scale is shared by 64 weights in 4 bits, by a row
in 8."""
QUANTIZED_BYTES: Mapping[Quantization, float] = {"8bit": 1.0, "4bit": 0.5 + SCALE_BYTES["4bit"]}
"""Bytes per quantized weight, with its part of a scale."""


def frozen_bytes(
    model: str | Path, precision: Precision, quantization: Quantization | None = None
) -> float:
    """Estimate the size of the weights of a model that is not trained, in bytes.

    Under bf16 all but the embeddings are stored in bfloat16: see `held_in_bfloat16`. Embeddings and
    head are not quantized.
    """
    count, itemsize = parameter_count(model), weights_dtype(precision).itemsize
    embeddings = min(count, _embedding_count(model))
    if is_quantized(base_folder(model)):
        return float(sum(path.stat().st_size for path in base_folder(model).glob("*.safetensors")))
    if quantization:
        ends = min(count, embeddings * (1 if _is_tied(model) else 2))
        return QUANTIZED_BYTES[quantization] * (count - ends) + itemsize * ends
    return 2.0 * (count + embeddings) if precision == "bf16" else float(count * itemsize)


def _embedding_count(model: str | Path) -> int:
    """Return the number of weights of the input embeddings."""
    return int(_config(model).get("vocab_size", 0)) * _shape(model)[1]


def _is_tied(model: str | Path) -> bool:
    """Return whether no head is stored apart from the embeddings."""
    return not any("lm_head" in name for name, _ in _tensors(base_folder(model)))


def _weight_bytes(config: TrainConfig) -> float:
    return float(weights_dtype(precision_of(config)).itemsize)


def _trained(config: TrainConfig) -> float:
    """Return the approximate share of the weights that are trained."""
    if not config.trains_adapter:
        return 1.0
    folder, base = Path(config.model), base_folder(config.model)
    if config.lora is None:
        own = float(sum(math.prod(shape) for _, shape in _tensors(folder)))
    else:
        own = 0.01 * parameter_count(base) + _saved_count(base, config.lora.modules_to_save)
    return min(1.0, own / parameter_count(folder))


def _saved_count(base: Path, names: Sequence[str]) -> int:
    """Count the weights of the layers that are trained whole."""
    layers, ends = (
        [(name.rpartition(".")[0], shape) for name, shape in _tensors(base)],
        tuple(names),
    )
    return sum(math.prod(shape) for layer, shape in layers if layer.endswith(ends))


def _tensors(folder: Path) -> list[tuple[str, list[int]]]:
    return [entry for path in folder.glob("*.safetensors") for entry in tensor_shapes(path)]


def _checkpoint_bytes(config: TrainConfig) -> float:
    """Estimate the size of the two kept checkpoints and the one that is being written."""
    dtype = torch.float32 if config.trains_adapter else weights_dtype(precision_of(config))
    each = dtype.itemsize + state_bytes(config.optimizer, dtype, torch.device("cpu"))
    return 3 * each * parameter_count(config.model) * _trained(config)


def scoring_bytes(
    models: Sequence[str | Path],
    tokens: int,
    quantization: Quantization | None = None,
    precision: Precision = "fp32",
) -> float:
    """Estimate the bytes of a scoring pass: weights, process, and one layer's activations."""
    weights = sum(frozen_bytes(model, precision, quantization) for model in models)
    return PROCESS_BYTES + weights + position_bytes(models[0]) * tokens


def position_bytes(model: str | Path) -> float:
    """Estimate the bytes per position of a float32 pass without gradients."""
    _, width = _shape(model)
    return 4.0 * LIVE * width


def free_bytes() -> float:
    """Return the host memory available to this process, within its container's limit."""
    free = [_machine_free()]
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free.append(float(most) - float(used.read_text()) + _reclaimable())
    return max(0.0, min(free))


def _machine_free() -> float:
    """Read the kernel's available memory; half of the physical memory if it is not reported."""
    if _MEMINFO.exists() and (found := re.search(r"MemAvailable:\s+(\d+)", _MEMINFO.read_text())):
        return 1024.0 * int(found[1])
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _reclaimable() -> float:
    """Return the bytes of the container's page cache that the kernel can reclaim."""
    found = re.search(r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.M)
    return float(found[1]) if found else 0.0


def free_on(device: torch.device) -> float:
    """Return the bytes available on `device`, including unused memory of torch's allocator."""
    return gpu_free_bytes(device) if device.type == "cuda" else free_bytes()


def kept_bytes(model: str | Path, precision: Precision = "fp32", *, twice: bool = False) -> float:
    """Estimate the bytes of one token's activations that are kept until the backward pass.

    If all layers are checkpointed (`twice`), these are the inputs of the layers and the activations
    of one layer. Autocast counts as float32: it keeps tensors of both dtypes, and copies of
    weights.
    """
    layers, width = _shape(model)
    return weights_dtype(precision).itemsize * width * (layers + KEPT if twice else KEPT * layers)


def _config(model: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((base_folder(model) / "config.json").read_text())
    return found


def _shape(model: str | Path) -> tuple[int, int]:
    """Read the number of layers and the hidden size of a model."""
    config = _config(model)
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 12
    width = config.get("hidden_size") or config.get("n_embd") or 768
    return int(layers), int(width)


FIRST = 2**12
"""Initial token budget on a GPU, small enough for any model that fits; it grows during the pass."""
CEILING = {"cpu": AT_ONCE["cpu"], "cuda": 2**18}
"""Largest useful token budget. On a CPU larger batches exceed the caches: two small models were
fastest from 1,024 to 4,096 tokens, and a fifth slower at 16,384."""
MEMORY_SHARE = 0.5
"""Share of the free memory that activations may take on a CPU; the estimate is rough."""
PHRASES = ("out of memory", "can't allocate memory", "not enough memory")
"""Messages of torch's RuntimeErrors that mean out of memory."""


class MemoryShortageError(LogratioError, RuntimeError):
    """A single group does not fit in memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means out of memory, so that a smaller batch may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in PHRASES)


class TokenBudget:
    """The number of tokens per batch, adapted to the batches that fit and those that do not.

    Attributes:
        tokens: Current number of tokens per batch.
        ceiling: Upper bound of `tokens`.
    """

    def __init__(self, tokens: int, ceiling: int | None = None) -> None:
        self.tokens, self.ceiling = tokens, ceiling or tokens

    def fitted(self, tokens: int) -> None:
        """Record that a batch fitted; double the budget if the batch used most of it."""
        if 2 * tokens > self.tokens:
            self.tokens = min(2 * self.tokens, self.ceiling)

    def exceeded(self, tokens: int) -> None:
        """Record that a batch did not fit; limit the budget to half of it."""
        self.tokens = self.ceiling = max(1, min(tokens, self.tokens) // 2)


def token_budget(given: int | None, model: str | Path, device: torch.device) -> TokenBudget:
    """Return `given` as a fixed budget, or an initial one: low on a GPU, from free memory on a CPU.

    Args:
        given: Tokens per batch set by the user, or None.
        model: Folder of the model.
        device: Device of the pass.
    """
    if given is not None:
        return TokenBudget(given)
    ceiling = CEILING.get(device.type, CEILING["cpu"])
    if device.type == "cuda":
        return TokenBudget(FIRST, ceiling)
    fits = int(MEMORY_SHARE * free_bytes() / position_bytes(model))
    return TokenBudget(max(1, min(ceiling, fits)))


TREE_AT_ONCE = 2**14
"""Maximum number of waiting groups considered for the next micro-batch of a tree."""


class GroupQueue:
    """A queue of groups to score, longest first, so that a shortage of memory shows at once.

    In the tree layout, groups that share a beginning are adjacent instead.

    Attributes:
        groups: Group numbers in the order of scoring, int64.
        position: Number of groups taken so far.
    """

    def __init__(self, store: Store, groups: np.ndarray, layout: str) -> None:
        """Queue `groups` (int64 `[G]`) for micro-batches in `layout`."""
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
        """Return the next groups with at most `budget` tokens in total; at least one group."""
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
    """Return the length of each group's longest row, in tokens."""
    offsets = store.completion_offsets()
    longest = np.maximum.reduceat(store.completion_lengths(), offsets[:-1])
    widths: np.ndarray = store.prompt_lengths() + longest
    return widths
