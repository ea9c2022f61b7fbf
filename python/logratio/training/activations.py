"""Activation checkpointing, offloading and compilation of decoder layers.

`layer_options` applies them to a model. `choose_checkpointing` chooses how many layers to
checkpoint: it measures the activations that each layer saves, and compares them with free memory.
"""

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
from logratio.logps.attention.interface import NAME, attention_in_graph
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.tree import SharedTree
from logratio.logps.batch import shape_for, to_torch
from logratio.logps.completion import transformer
from logratio.logps.scores import differentiable_values
from logratio.logps.sequences import Sequences
from logratio.training import memory
from logratio.training.config import TrainConfig
from logratio.training.memory import GroupQueue
from logratio.training.models import autocast, precision_of, training_budget
from logratio.training.optimizers import gradient_bytes

WORTH_MOVING = 2**20
"""Smaller tensors, in bytes, are not offloaded: the copy would cost more than it saves."""

COMPILER = "inductor"
"""Backend of torch.compile."""

Forward = Callable[..., Any]


@dataclass(frozen=True)
class LayerOptions:
    """How the decoder layers of a model run in passes with gradients.

    Attributes:
        checkpointed: Number of layers, counted from the first, that keep only their input and are
            recomputed in the backward pass. The first layers are the best choice: they are
            recomputed last, when the other layers have freed their activations.
        offload: Keep saved activations in host memory until the backward pass. Costs two
            transfers per micro-batch, which the device waits for.
        compiled: Compile the layers for any width; identical layers share a graph (torch.compile).
            Takes up to a minute at the start, and changes results by rounding.
    """

    checkpointed: int = 0
    offload: bool = False
    compiled: bool = False


class RecomputationError(LogratioError, ValueError):
    """A checkpointed layer was called with a key cache, so it cannot be recomputed."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a transformers model, or of one inside peft, in order.

    Empty for a model whose layers are not transformers' `GradientCheckpointingLayer`.
    """
    modules = transformer(model).modules()
    found = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inner]


@contextmanager
def layer_options(model: nn.Module, kept: LayerOptions) -> Iterator[None]:
    """Run the layers of `model` as `kept` specifies inside the block.

    Gradients equal those of the plain model, bit for bit if its kernels are deterministic and not
    compiled. Passes without gradients are not affected.
    """
    if kept == LayerOptions():
        yield
        return
    layers = decoder_layers(model)
    before = [vars(layer).get("forward") for layer in layers]
    shapes = {_sorted(p.shape) for p in model.parameters() if p.dim() > 1}
    attention = ALL_ATTENTION_FUNCTIONS[NAME]
    try:
        if kept.compiled:
            AttentionInterface.register(NAME, attention_in_graph)
        for number, layer in enumerate(layers):
            twice = number < kept.checkpointed
            weights = shapes if kept.offload else None
            layer.forward = _Layer(
                layer.forward,
                twice=twice,
                weights=weights,
                compiled=kept.compiled,
                drops=any(map(drops_values, layer.modules())),
            )
        yield
    finally:
        AttentionInterface.register(NAME, attention)
        for layer, own in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if own is not None:
                layer.forward = own


def drops_values(module: nn.Module) -> bool:
    """Return whether a module is a dropout layer in training mode."""
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def _compiled(forward: Forward) -> Forward:
    """Compile for any number of rows and tokens, so that later shapes reuse the first graph."""
    made: Forward = torch.compile(forward, dynamic=True, backend=COMPILER)
    return made


class _Layer:
    """A layer's forward with checkpointing, offloading or compilation.

    Tensors with a shape in `weights` are not offloaded; None: offload nothing. If a layer drops
    values at random, its second pass must draw the same numbers as its first.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        twice: bool,
        weights: set[tuple[int, ...]] | None,
        compiled: bool,
        drops: bool,
    ) -> None:
        self._plain, self._twice, self._weights = forward, twice, weights
        self._drops, self._compiled = drops, compiled
        self._forward = _compiled(forward) if compiled else forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        if self._compiled:
            _prepare(kwargs.get("shared_prompt"))
        with self._hooks():
            if not self._twice:
                return self._forward(*args, **kwargs)
            if kwargs.get("past_key_values") is not None or kwargs.get("layer_past") is not None:
                raise RecomputationError("a second pass would fill the layer's key cache twice")
            return checkpoint(
                self._forward, *args, use_reentrant=False, preserve_rng_state=self._drops, **kwargs
            )

    def _hooks(self) -> AbstractContextManager[Any]:
        if self._weights is None:
            return nullcontext()
        return saved_tensors_hooks(_Mover(self._weights).pack, unpack)


def _prepare(row: SharedPrompt | SharedTree | None) -> None:
    if row is not None and isinstance(row.sequences, Sequences):
        row.sequences.prepare()


def _sorted(shape: torch.Size) -> tuple[int, ...]:
    return tuple(sorted(shape))


class _Mover:
    """Offloads the tensors that one layer's forward saves; each tensor is copied once."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        self._weights = weights
        self._moved: dict[tuple[Any, ...], tuple[Tensor, HostCopy]] = {}

    def pack(self, tensor: Tensor) -> "Tensor | HostCopy":
        """Return a copy in host memory, or the tensor itself if offloading would free nothing."""
        if tensor.nbytes < WORTH_MOVING or _sorted(tensor.shape) in self._weights:
            return tensor  # a weight, or autocast's copy of one, which stays in memory anyway
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if place not in self._moved:
            # Keeping the tensor alive ensures that its address is not reused.
            self._moved[place] = tensor, HostCopy(tensor)
        return self._moved[place][1]


class HostCopy:
    """A tensor offloaded to host memory, pinned if it comes from CUDA.

    Both copies are queued on the current stream, so the host does not wait, and no memory is
    reused before its copy has completed.
    """

    def __init__(self, tensor: Tensor) -> None:
        pinned = tensor.device.type == "cuda"
        self._device = tensor.device
        # empty_like keeps the strides, which compiled layers rely on.
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        self._host.copy_(tensor, non_blocking=pinned)
        self._back: weakref.ref[Tensor] | None = None

    def restore(self) -> Tensor:
        """Return the tensor on its device; the same object as long as it is referenced."""
        back = self._back() if self._back else None
        if back is None:
            back = self._host.to(self._device, non_blocking=True, copy=True)
            self._back = weakref.ref(back)
        return back


def unpack(packed: Tensor | HostCopy) -> Tensor:
    """Return the tensor that `_Mover.pack` received."""
    return packed.restore() if isinstance(packed, HostCopy) else packed


SHARE = 0.8
"""Share of the memory left by optimizer states and gradients that activations may use. The margin
covers fragmentation and differences between batches; states and gradients are known exactly."""
CLEAR = 3
"""If the estimate fits this many times, activations are not measured."""
TILES = 2e8
"""Bytes of the head's tiles on a CPU, in addition to the layers."""


@dataclass(frozen=True)
class LayerMemory:
    """Memory that one decoder layer holds for a micro-batch until the backward pass, in bytes.

    Attributes:
        everything: All tensors saved by its operations, without weights.
        inputs: Its input hidden states, which are kept in any case.
    """

    everything: float
    inputs: float


@dataclass(frozen=True)
class Choice:
    """The number of layers to checkpoint, and why.

    Attributes:
        layers: Number of checkpointed layers, counted from the first.
        reason: A note for the user; None if there is nothing to report.
    """

    layers: int
    reason: str | None = None


def measure_layers(model: nn.Module, forward: Callable[[], Tensor]) -> list[LayerMemory]:
    """Run `forward` once and return the memory that each decoder layer would hold.

    The saved tensors are discarded: at most one layer's activations are in memory at a time.
    """
    meter = _Meter()
    with meter.watching(decoder_layers(model)), torch.enable_grad():
        forward()
    return meter.found


class _Meter:
    """Counts the storages that operations save, layer by layer."""

    def __init__(self) -> None:
        self.found: list[LayerMemory] = []
        self._weights = set[int]()
        self._alive: dict[int, torch.UntypedStorage] | None = None
        self._inputs = 0.0

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Measure the forward passes inside the block."""
        handles = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        handles += [layer.register_forward_hook(self._leave) for layer in layers]
        try:
            with saved_tensors_hooks(self._save, self._never):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._alive = {}
        # A layer of a sharded model has its whole weights from now on.
        self._weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        self._inputs = sum(float(x.nbytes) for x in inputs if isinstance(x, Tensor))

    def _leave(self, _layer: nn.Module, _inputs: Any, _outputs: Any) -> None:
        kept = sum(float(storage.nbytes()) for storage in (self._alive or {}).values())
        self.found.append(LayerMemory(kept, self._inputs))
        self._alive = None

    def _save(self, tensor: Tensor) -> None:
        """Record a storage, and keep it alive until its layer ends so its address is unique."""
        storage = tensor.untyped_storage()
        if self._alive is not None and storage.data_ptr() not in self._weights:
            self._alive[storage.data_ptr()] = storage

    @staticmethod
    def _never(_nothing: None) -> Tensor:
        raise RuntimeError("a measurement has no backward pass")


def layers_that_do_not_fit(layers: Sequence[LayerMemory], room: float) -> int:
    """Return how many layers, counted from the first, to checkpoint to fit in `room` bytes."""
    total = sum(layer.everything for layer in layers)
    for count, layer in enumerate(layers):
        if total <= room:
            return count
        total -= max(0.0, layer.everything - layer.inputs)
    return len(layers)


def checkpointing_for_memory(
    model: nn.Module,
    forward: Callable[[], Tensor],
    *,
    estimate: float,
    states: float,
    added_up: bool = True,
    free: float | None = None,
    gradient_shards: int = 1,
) -> Choice:
    """Choose how many layers to checkpoint so that a micro-batch fits in memory.

    Several processes choose the same if they give the same `free`.

    Args:
        model: The policy, on its device. Its gradients are None before and after the call.
        forward: Scores the run's largest micro-batch and returns a differentiable tensor.
        estimate: Estimated size of its activations, in bytes.
        states: Bytes that the optimizer state will take on that device.
        added_up: Whether updates accumulate gradients over several micro-batches.
        free: Bytes available on that device; None: measured.
        gradient_shards: Number of processes among which gradients are divided.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * gradient_bytes(p.dtype, added_up=added_up) for p in trained)
    free = memory.free_on(_device(model)) if free is None else free
    room = SHARE * max(0.0, free - states - gradients / gradient_shards)
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
        f"activation checkpointing: {count} of {len(layers)} layers are recomputed in the backward "
        f"pass; all activations would take {size(kept)}, and {size(max(0.0, room))} are free",
    )


def _peak(model: nn.Module, forward: Callable[[], Tensor], layers: int) -> float:
    """Return the peak memory of a forward and backward pass with all layers checkpointed, in bytes.

    CUDA only. The first pass allocates the gradients, so that the second does not count them.
    """
    device = _device(model)
    with layer_options(model, LayerOptions(checkpointed=layers)):
        forward().sum().backward()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward().sum().backward()
    model.zero_grad(set_to_none=True)
    return float(torch.cuda.max_memory_allocated(device) - before)


def _device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def choose_checkpointing(
    config: TrainConfig,
    store: Store,
    policy: nn.Module,
    layout: str,
    states: float,
    *,
    free: float | None = None,
    gradient_shards: int = 1,
    per_prompt: int = 1,
) -> Choice:
    """Choose how many layers a run checkpoints, as `config.activation_checkpointing` requests.

    Args:
        config: Settings of the run.
        store: Data of the run; the longest groups form the largest micro-batch.
        policy: The policy on its device, ready for batches of `layout`.
        layout: "shared", "tree" or "padded". Micro-batches of a tree are as large as shared ones.
        states: Bytes that the optimizer state will take on that device.
        free: As in `checkpointing_for_memory`.
        gradient_shards: As in `checkpointing_for_memory`.
        per_prompt: Number of processes that compute a micro-batch together.

    Raises:
        ConfigError: The settings need transformers' own decoder layers and the model has none.
    """
    wanted, layers = config.activation_checkpointing, len(decoder_layers(policy))
    compiled = config.compile_layers == "on"
    asked = wanted == "all" or config.offload_activations or compiled
    if asked and not layers:
        raise ConfigError(
            "--activation-checkpointing all, --offload-activations and --compile need decoder "
            f"layers of transformers, and {type(policy).__name__} has none"
        )
    if wanted != "auto":
        return Choice(layers if wanted == "all" else 0)
    layout = "shared" if layout == "tree" else layout
    queue = GroupQueue(store, np.arange(len(store)), layout)
    groups = queue.take(training_budget(config) * per_prompt)
    groups = groups[: config.batch_size]
    tokens = lay_out(store, groups, layout).input_ids.size

    def forward() -> Tensor:
        device = _device(policy)
        shape = shape_for(layout, device)
        batch = to_torch(lay_out(store, groups, layout, **shape), device)
        with autocast(precision_of(config), device):
            return differentiable_values(policy, batch)

    estimate = memory.kept_bytes(config.model, precision_of(config)) * tokens / per_prompt
    added_up = len(groups) < min(config.batch_size, len(store))
    return checkpointing_for_memory(
        policy,
        forward,
        estimate=estimate,
        states=states,
        added_up=added_up,
        free=free,
        gradient_shards=gradient_shards,
    )
