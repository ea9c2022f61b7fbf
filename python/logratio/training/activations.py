"""How decoder layers are run: what they keep for the backward pass, and whether they are compiled.

A layer is wrapped on the instance, around its `forward`: transformers' own switch for checkpointing
(`GradientCheckpointingLayer`) works in training mode only, and policies train in eval mode, where
no dropout draws. Module names, parameters and keyword arguments stay as they are.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from logratio.errors import LogratioError
from logratio.logps.attention import NAME
from logratio.logps.completion import transformer

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
