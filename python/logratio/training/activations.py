"""What decoder layers keep for the backward pass, and how many must be computed twice to fit."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from logratio._rust import Store
from logratio.data.feed import lay_out
from logratio.errors import ConfigError, LogratioError
from logratio.forecast import size
from logratio.logps.attention.interface import NAME
from logratio.logps.batch import shape_for, to_torch
from logratio.logps.completion import completion_logps, transformer
from logratio.training import memory
from logratio.training.config import TrainConfig
from logratio.training.memory import GroupQueue
from logratio.training.models import autocast, precision_of, training_budget
from logratio.training.optimizers import gradient_bytes

WORTH_MOVING = 2**20
"""Bytes of a tensor below which a copy costs more than it frees."""

COMPILER = "inductor"
"""What makes kernels of graphs: torch's own."""

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Kept:
    """What the layers of a model keep.

    Attributes:
        checkpointed: so many layers, from the first on, keep their input only and are computed a
            second time in the backward pass, one after the other. The first are the best: they are
            computed again when the others have already let go of what they kept.
        compiled: layers are compiled for any width, all alike ones together (torch.compile). It
            costs up to a minute at the start. Results change by rounding.
        offload: what is kept lies in host memory until the backward pass. Costs two copies of it
            over the bus for each micro-batch, which the device waits for.
    """

    checkpointed: int = 0
    offload: bool = False
    compiled: bool = False


class RecomputationError(LogratioError, ValueError):
    """A layer that cannot be computed twice was asked to be."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers model, or one inside peft, from the first to the last.

    Empty for a model whose layers are not transformers' `GradientCheckpointingLayer`.
    """
    modules = transformer(model).modules()
    found = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inner]


@contextmanager
def keeping(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Let the layers of `model` keep what `kept` says inside the block, and everything after it.

    Gradients are those of the plain model, bit for bit where its kernels are deterministic and the
    same. Passes without gradients are not touched.
    """
    if kept == Kept():
        yield
        return
    layers = decoder_layers(model)
    before = [vars(layer).get("forward") for layer in layers]
    shapes = {_sorted(p.shape) for p in model.parameters() if p.dim() > 1}
    attention = ALL_ATTENTION_FUNCTIONS[NAME]
    try:
        if kept.compiled:  # it goes from group to group: no two micro-batches would share a graph
            AttentionInterface.register(NAME, torch.compiler.disable(attention))
        for number, layer in enumerate(layers):
            twice = number < kept.checkpointed
            weights = shapes if kept.offload else None
            layer.forward = _Layer(
                layer.forward, twice=twice, weights=weights, compiled=kept.compiled
            )
        yield
    finally:
        AttentionInterface.register(NAME, attention)
        for layer, own in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if own is not None:
                layer.forward = own


def _compiled(forward: Forward) -> Forward:
    """Compile for any number of rows and tokens: a new one finds the graphs of the first."""
    made: Forward = torch.compile(forward, dynamic=True, backend=COMPILER)
    return made


class _Layer:
    """A layer's forward that keeps less; `weights` are the shapes of what offloading leaves."""

    def __init__(
        self,
        forward: Forward,
        *,
        twice: bool,
        weights: set[tuple[int, ...]] | None,
        compiled: bool,
    ) -> None:
        self._plain, self._twice, self._weights = forward, twice, weights
        self._forward = _compiled(forward) if compiled else forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        with self._hooks():
            if not self._twice:
                return self._forward(*args, **kwargs)
            if kwargs.get("past_key_values") is not None or kwargs.get("layer_past") is not None:
                raise RecomputationError("a second pass would fill the layer's key cache twice")
            # Dropout is off, so there is no state of a generator to keep.
            return checkpoint(
                self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

    def _hooks(self) -> AbstractContextManager[Any]:
        if self._weights is None:
            return nullcontext()
        return saved_tensors_hooks(_Mover(self._weights).pack, unpack)


def _sorted(shape: torch.Size) -> tuple[int, ...]:
    return tuple(sorted(shape))


class _Mover:
    """Moves what one layer's forward saves; what several operations save is moved once."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        self._weights = weights
        self._moved: dict[tuple[Any, ...], tuple[Tensor, HostCopy]] = {}

    def pack(self, tensor: Tensor) -> "Tensor | HostCopy":
        """Return a copy in host memory, or the tensor itself where that would free nothing."""
        if tensor.nbytes < WORTH_MOVING or _sorted(tensor.shape) in self._weights:
            return tensor  # weights, or autocast's copies of them, which live on anyway
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if place not in self._moved:
            self._moved[place] = tensor, HostCopy(tensor)  # alive, so that its place is its own
        return self._moved[place][1]


class HostCopy:
    """A tensor that waits in host memory, pinned where it comes from CUDA.

    Both copies are queued on the current stream: nothing waits on the host, and neither side's
    memory is used again before its copy is done.
    """

    def __init__(self, tensor: Tensor) -> None:
        pinned = tensor.device.type == "cuda"
        self._device = tensor.device
        # With its strides, which compiled layers count on.
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        self._host.copy_(tensor, non_blocking=pinned)
        self._back: weakref.ref[Tensor] | None = None

    def restore(self) -> Tensor:
        """Return it on its device; the same tensor as long as anybody uses it."""
        back = self._back() if self._back else None
        if back is None:
            back = self._host.to(self._device, non_blocking=True, copy=True)
            self._back = weakref.ref(back)
        return back


def unpack(packed: Tensor | HostCopy) -> Tensor:
    """Return what `_Mover.pack` was given."""
    return packed.restore() if isinstance(packed, HostCopy) else packed


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
    room = SHARE * max(0.0, memory.free_on(_device(model)) - states - gradients)
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

    estimate = memory.kept_bytes(config.model, precision_of(config)) * tokens
    added_up = len(groups) < min(config.batch_size, len(store))
    return choose(policy, forward, estimate=estimate, states=states, added_up=added_up)
