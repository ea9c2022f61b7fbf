"""The head of a model, applied in tiles: some positions by the whole vocabulary, in one buffer."""

import threading
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Config entries with a factor of the logits: Cohere, MPT; Muse; Falcon-H1."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Config entries with a cap of the logits: Gemma; RecurrentGemma."""
SCALING_MULTIPLIES = ("hyperclovax",)
"""Families that multiply by `logits_scaling`; Granite and MiniCPM3 divide by it."""


@dataclass(frozen=True)
class Transform:
    """Transform of the head's product `z`: `cap·tanh(scale·z / cap)`, or `scale·z` without cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Transform":
        """Return the transform in a model's config."""
        config = model.config.get_text_config()
        caps = (getattr(config, name, None) for name in CAPS)
        return cls(_scale(config), next((float(cap) for cap in caps if cap is not None), None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits `[n, V]`."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def _scale(config: Any) -> float:
    for name in MULTIPLIERS:
        if isinstance(value := getattr(config, name, None), int | float):
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type in SCALING_MULTIPLIES else 1 / scaling)


@dataclass(frozen=True)
class Head:
    """A head that is one matrix: logits = transform(h Wᵀ + b).

    Attributes:
        weight: The matrix W, `[V, H]`.
        bias: The bias b, `[V]`, or None.
        transform: The scale and cap of the model family.
    """

    weight: Tensor
    bias: Tensor | None
    transform: Transform

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head | None":
        """Return a model's head; None if it is more than a matrix (an adapter, 8-bit weights)."""
        head = active_layer(model.get_output_embeddings())
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
            return None
        return cls(head.weight, head.bias, Transform.of(model))

    @property
    def is_trained(self) -> bool:
        """Whether the head's weight or bias requires gradients."""
        bias = self.bias is not None and self.bias.requires_grad
        return self.weight.requires_grad or bias

    def cast(self, dtype: torch.dtype) -> "Head":
        """Return a detached copy of the head in the dtype of matrix products."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, weight=self.weight.detach().to(dtype), bias=bias)


def active_layer(head: Any) -> Any:
    """Return the layer that peft's `modules_to_save` wrapper applies now; others unchanged.

    That is the trained copy of the active adapter, or the original while adapters are disabled.
    """
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    names = [] if head.disable_adapters else [n for n in head.active_adapters if n in copies]
    return copies[names[0]] if names else head.original_module


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the head like the model's forward: hidden states `[n, H]` to logits `[n, V]`.

    Hidden states are cast to the head's dtype, because a body may return float32 for a head in
    bfloat16 (Mamba's residuals).
    """
    head = model.get_output_embeddings()
    dtype = getattr(getattr(head, "weight", None), "dtype", hidden.dtype)
    if dtype.is_floating_point:  # quantized heads accept any dtype
        hidden = hidden.to(dtype)
    logits: Tensor = Transform.of(model)(head(hidden))
    return logits


TILE_ELEMENTS = 2**24
"""Logits per tile on a CPU: 64 MiB in float32."""
ON_GPU = (2**26, 2**29)
"""Smallest and largest number of logits per tile on a GPU. Larger tiles mean fewer products, and
fewer groups that exceed a tile and must be computed twice. The largest tile has 3,533 positions for
a vocabulary of 151,936."""
BYTES, SHARE = 8, 1 / 32
"""Bytes per logit, with its copy in the dtype of products; share of the free memory for a tile."""
ALIGNED = {"cuda": 8}
"""Rows of logits are padded to a multiple of this: products are slow if rows start at unaligned
addresses, for example with 50,257 or 32,001 bfloat16 values."""
COLUMNS = 512
"""Rows of the head that a CPU multiplies at a time. With a few hundred positions they stay in the
second-level cache (measured: 160 GFLOP/s on two cores; 115 with the whole head at once)."""

_kept = threading.local()


def tile_rows(head: Head) -> int:
    """Return the number of positions per tile."""
    device = head.weight.device
    elements = _gpu_elements(device) if device.type == "cuda" else TILE_ELEMENTS
    return max(1, elements // len(head.weight))


@cache
def _gpu_elements(device: torch.device) -> int:
    """Return the logits per tile, measured once after loading the model and then constant."""
    return elements_for(gpu_free_bytes(device))


def elements_for(free: float) -> int:
    """Return the number of logits per tile on a GPU with `free` bytes of memory.

    It is a power of two, so that small differences in free memory between starts have no effect.
    """
    fewest, most = ON_GPU
    fits = int(free * SHARE / BYTES)
    return min(most, max(fewest, 1 << max(0, fits.bit_length() - 1)))


def gpu_free_bytes(device: torch.device) -> float:
    """Return the bytes available on a GPU, including unused memory of torch's allocator."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + unused)


class _Memory:
    """A buffer for one tile of logits, which each thread reuses on a CPU.

    Allocating new pages would cost a fifth of the product that fills them. On a GPU, torch's
    allocator already reuses memory.
    """

    def __init__(self, rows: int, head: Head) -> None:
        """Allocate `[rows, V]` in float32 or wider, with rows padded to a multiple of `ALIGNED`."""
        device, step = head.weight.device, ALIGNED.get(head.weight.device.type, 1)
        width = -(-len(head.weight) // step) * step
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self._flat = getattr(_kept, "flat", None) if device.type == "cpu" else None
        _kept.flat = None  # a nested tile must not share this buffer
        size = rows * width
        if self._flat is None or self._flat.dtype != dtype or self._flat.numel() < size:
            self._flat = torch.empty(size, dtype=dtype, device=device)
        self.logits = self._flat[:size].view(rows, width)

    def give_back(self) -> None:
        """Return the buffer, for the thread's next tile."""
        if self._flat is not None and self._flat.device.type == "cpu":
            _kept.flat = self._flat


class Tile:
    """Logits of `n` positions, overwritten in place by p − 1_t, the gradient of −log p(target).

    Attributes:
        logps: Log-prob of each target in nats, float32 `[n]`.
        collisions: Log of the sum of all squared probabilities, float32 `[n]`; None: not asked for.
    """

    def __init__(
        self, head: Head, hidden: Tensor, target_ids: Tensor, *, collisions: bool = False
    ) -> None:
        """Score `target_ids` `[n]` from `hidden` `[n, H]`, both in the dtype of `head`.

        See `Head.cast`.
        """
        self.collisions: Tensor | None = None
        self._wants_collisions = collisions
        self._head, self._hidden, self._targets = head, hidden, target_ids
        self._slope: Tensor | None = None
        self._memory = _Memory(len(hidden), head)
        self._filled = self._memory.logits
        self._residual = self._filled[:, : len(head.weight)]
        self._multiply()
        self._transform()
        self.logps = self._normalize()

    def __enter__(self) -> "Tile":
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.give_back()

    def _multiply(self) -> None:
        """Fill the buffer with h Wᵀ + b."""
        weight, out = self._head.weight, self._residual
        if weight.dtype == out.dtype:
            step = COLUMNS if weight.device.type == "cpu" else len(weight)
            for start in range(0, len(weight), step):
                part = slice(start, start + step)
                torch.mm(self._hidden, weight[part].t(), out=out[:, part])
        elif weight.device.type == "cuda":
            torch.mm(self._hidden, weight.t(), out_dtype=out.dtype, out=out)
        else:
            torch.mm(self._hidden, weight.t(), out=(low := self._low(weight.dtype)))
            out.copy_(low)
        if self._head.bias is not None:
            out.add_(self._head.bias)

    def _low(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._residual.shape, dtype=dtype, device=self._residual.device)

    def _transform(self) -> None:
        """Scale and cap in place; save the cap's slope, 1 − tanh², for the gradient."""
        scale, cap = self._head.transform.scale, self._head.transform.cap
        if scale != 1.0:
            self._residual.mul_(scale)
        if cap is not None:
            capped = self._residual.div_(cap).tanh_()
            self._slope = capped.square().neg_().add_(1)
            capped.mul_(cap)

    def _normalize(self) -> Tensor:
        """Replace logits by p − 1_t, and return the targets' log-probs.

        The largest probability is 1 / Σ exp(z − max), so the log-sum-exp needs no separate pass.
        """
        logits, targets = self._filled, self._targets[:, None]
        if logits.shape[1] > (vocabulary := len(self._head.weight)):
            logits[:, vocabulary:] = -torch.inf
        own, highest = logits.gather(1, targets)[:, 0], logits.amax(1)
        torch.softmax(logits, 1, out=logits)
        logps = own - highest + logits.amax(1).log()
        if self._wants_collisions:
            self.collisions = 2 * torch.linalg.vector_norm(logits, dim=1).log()
        logits.scatter_add_(1, targets, torch.full_like(own, -1.0)[:, None])
        return logps

    @cached_property
    def _slopes(self) -> Tensor:
        """P − 1_t times the cap's slope, in the dtype of products."""
        if self._slope is not None:
            self._residual.mul_(self._slope)
        return self._filled.to(self._head.weight.dtype)[:, : len(self._head.weight)]

    def hidden_gradient(self, gradient: Tensor | None = None) -> Tensor:
        """Return d(Σ gradient · logps) / d hidden, `[n, H]`; None means a gradient of ones."""
        out = self._slopes @ self._head.weight
        factor = -self._head.transform.scale
        return out.mul_(factor if gradient is None else (gradient * factor)[:, None].to(out.dtype))

    def add_head_gradient(
        self, gradient: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Add d(Σ gradient · logps) / d weight, `[V, H]`, and / d bias, `[V]`, in place.

        Args:
            gradient: Gradient of the log-probs, `[n]`.
            weight: Sum to add to; None if the weight is not trained.
            bias: Sum to add to; None if the bias is not trained.
        """
        slopes, factor = self._slopes, (gradient * -self._head.transform.scale)[:, None]
        if bias is not None:
            bias.add_((slopes.t() @ factor.to(slopes.dtype))[:, 0])
        if weight is None:
            return
        weighted = (self._hidden * factor).to(slopes.dtype)
        if weight.dtype == slopes.dtype:
            weight.addmm_(slopes.t(), weighted)
        elif weight.device.type == "cuda":  # one pass, and the product is not rounded
            torch.addmm(weight, slopes.t(), weighted, out_dtype=weight.dtype, out=weight)
        else:
            weight.add_(slopes.t() @ weighted)
