"""How many decoder layers must be computed twice for a micro-batch to fit: measured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from logratio._rust import Store
from logratio.data import lay_out
from logratio.forecast import size
from logratio.logps.completion import completion_logps
from logratio.logps.tensors import shape_for, to_torch
from logratio.training import demand
from logratio.training.activations import Kept, decoder_layers, keeping
from logratio.training.budget import GroupQueue
from logratio.training.config import TrainConfig
from logratio.training.models import autocast, precision_of, training_budget
from logratio.training.optimizers import gradient_bytes
from logratio.training.setup import ConfigError

SHARE = 0.8
"""Of the memory that states and gradients leave, what activations may count on: allocators leave
gaps, and batches differ. States and gradients are known to the byte, so they come off before."""
CLEAR = 3
"""A forecast that fits so many times over needs no measurement."""
TILES = 2e8
"""What the head's tiles take on a CPU, beside the layers."""


@dataclass(frozen=True)
class LayerMemory:
    """What one decoder layer keeps of a micro-batch until the backward pass, in bytes.

    Attributes:
        everything: all that its operations saved, weights left out.
        inputs: the hidden states that it was given, which it keeps in any case.
    """

    everything: float
    inputs: float


@dataclass(frozen=True)
class Choice:
    """How many layers are computed twice, of how many, and a sentence about why.

    Attributes:
        layers: computed twice, from the first on.
        reason: None where that is none.
    """

    layers: int
    reason: str | None = None


def measure_layers(model: nn.Module, forward: Callable[[], Tensor]) -> list[LayerMemory]:
    """Run `forward` once, which keeps nothing, and return what each decoder layer would keep.

    At most one layer's activations are alive at a time, as in a pass without gradients.
    """
    meter = _Meter({p.untyped_storage().data_ptr() for p in model.parameters()})
    with meter.watching(decoder_layers(model)), torch.enable_grad():
        forward()
    return meter.found


class _Meter:
    """Counts the storages that operations save, layer by layer."""

    def __init__(self, weights: set[int]) -> None:
        self.found: list[LayerMemory] = []
        self._weights = weights
        self._alive: dict[int, torch.UntypedStorage] | None = None
        self._inputs = 0.0

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Count inside the block."""
        handles = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        handles += [layer.register_forward_hook(self._leave) for layer in layers]
        try:
            with saved_tensors_hooks(self._save, self._never):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._alive = {}
        self._inputs = sum(float(x.nbytes) for x in inputs if isinstance(x, Tensor))

    def _leave(self, _layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
        kept = sum(float(storage.nbytes()) for storage in (self._alive or {}).values())
        self.found.append(LayerMemory(kept, self._inputs))
        self._alive = None

    def _save(self, tensor: Tensor) -> None:
        """Note a storage; it stays alive until its layer ends, so that its place is its own."""
        storage = tensor.untyped_storage()
        if self._alive is not None and storage.data_ptr() not in self._weights:
            self._alive[storage.data_ptr()] = storage

    @staticmethod
    def _never(_nothing: None) -> Tensor:
        raise RuntimeError("a measurement has no backward pass")


def layers_that_do_not_fit(layers: Sequence[LayerMemory], room: float) -> int:
    """Return how many layers, from the first on, must keep their input only to fit in `room`."""
    total = sum(layer.everything for layer in layers)
    for count, layer in enumerate(layers):
        if total <= room:
            return count
        total -= max(0.0, layer.everything - layer.inputs)
    return len(layers)


def choose(
    model: nn.Module,
    forward: Callable[[], Tensor],
    *,
    estimate: float,
    states: float,
    added_up: bool = True,
) -> Choice:
    """Return how many layers must be computed twice.

    Args:
        model: the policy, on its device, without gradients yet; it has none afterwards.
        forward: scores the run's largest micro-batch, with a result that is differentiable.
        estimate: bytes that its activations take, roughly.
        states: bytes that the optimizer will take on that device.
        added_up: whether updates have several micro-batches, whose gradients are added up.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * gradient_bytes(p.dtype, added_up=added_up) for p in trained)
    room = SHARE * max(0.0, demand.free_on(_device(model)) - states - gradients)
    if not decoder_layers(model) or CLEAR * estimate <= room:
        return Choice(0)
    layers = measure_layers(model, forward)
    if _device(model).type == "cuda":
        room -= _peak(model, forward, len(layers))
    else:
        room -= TILES + max(layer.everything for layer in layers)
    count = layers_that_do_not_fit(layers, room)
    if count == 0:
        return Choice(0)
    kept = sum(layer.everything for layer in layers)
    return Choice(
        count,
        f"activation checkpointing: {count} of {len(layers)} layers are computed twice; all of "
        f"them would keep {size(kept)}, and {size(max(0.0, room))} are free for it",
    )


def _peak(model: nn.Module, forward: Callable[[], Tensor], layers: int) -> float:
    """Return what a pass and its backward take on CUDA with all layers checkpointed, in bytes.

    Gradients are there already, as in every micro-batch but the first: they are not counted.
    """
    device = _device(model)
    with keeping(model, Kept(checkpointed=layers)):
        forward().sum().backward()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().sum().backward()
    model.zero_grad(set_to_none=True)
    return float(torch.cuda.max_memory_allocated(device) - before)


def _device(model: nn.Module) -> torch.device:
    """Return where the model's first parameter lies."""
    return next(model.parameters()).device


def settle(
    config: TrainConfig, store: Store, policy: nn.Module, layout: str, states: float
) -> Choice:
    """Return what `config.activation_checkpointing` comes to for a run.

    Args:
        config: of the run.
        store: its data; the largest micro-batch is made of the longest groups.
        policy: on its device, ready for batches of `layout`.
        layout: "shared", "tree" or "padded". Micro-batches of a tree are as large as shared ones.
        states: bytes that the optimizer will take on that device.

    Raises:
        ConfigError: something is asked of the layers, and the model's are not transformers' own.
    """
    wanted, layers = config.activation_checkpointing, len(decoder_layers(policy))
    compiled = config.compile_layers == "on"
    asked = wanted == "all" or config.offload_activations or compiled
    if asked and not layers:
        raise ConfigError(
            "activation_checkpointing all, offload_activations and compile_layers need layers of "
            f"transformers' own kind, and {type(policy).__name__} has none"
        )
    if wanted != "auto":
        return Choice(layers if wanted == "all" else 0)
    layout = "shared" if layout == "tree" else layout
    groups = GroupQueue(store, np.arange(len(store)), layout).take(training_budget(config))
    groups = groups[: config.batch_size]
    tokens = lay_out(store, groups, layout).input_ids.size

    def forward() -> Tensor:
        device = _device(policy)
        shape = shape_for(layout, device)
        batch = to_torch(lay_out(store, groups, layout, **shape), device)
        with autocast(precision_of(config), device):
            return completion_logps(policy, batch)

    estimate = demand.kept_bytes(config.model, precision_of(config)) * tokens
    added_up = len(groups) < min(config.batch_size, len(store))
    return choose(policy, forward, estimate=estimate, states=states, added_up=added_up)
