"""A model's head, and a tile of its logits: some positions, the whole vocabulary, one buffer."""

import threading
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""How configs name a factor on the logits: Cohere, MPT; Muse; Falcon-H1."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""How configs name a cap on the logits: Gemma; RecurrentGemma."""
SCALING_MULTIPLIES = ("hyperclovax",)
"""Families that multiply by `logits_scaling`, by which Granite and MiniCPM3 divide."""


@dataclass(frozen=True)
class Transform:
    """What follows the matrix: `cap·tanh(scale·z / cap)`, or `scale·z` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Transform":
        """Read it in a model's config."""
        config = model.config.get_text_config()
        caps = (getattr(config, name, None) for name in CAPS)
        return cls(_scale(config), next((float(cap) for cap in caps if cap is not None), None))

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it to `[n, V]`."""
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
        weight: `[V, H]`.
        bias: `[V]`, or None.
        transform: what the family does to the product.
    """

    weight: Tensor
    bias: Tensor | None
    transform: Transform

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head | None":
        """Return a model's head; None where it is more than a matrix (an adapter, 8 bits)."""
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
            return None
        return cls(_whole(head.weight), _whole(head.bias), Transform.of(model))

    @property
    def is_trained(self) -> bool:
        """Whether the head wants gradients of its own."""
        bias = self.bias is not None and self.bias.requires_grad
        return self.weight.requires_grad or bias

    def cast(self, dtype: torch.dtype) -> "Head":
        """Return it in the dtype of a matrix product."""
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return replace(self, weight=self.weight.detach().to(dtype), bias=bias)


def _whole(parameter: Any) -> Any:
    """Gather a parameter that FSDP2 has sharded."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Apply the head as the model's own forward does: `[n, H]` to `[n, V]`.

    A body may return float32 for a head in bfloat16 (Mamba's residuals): the head's dtype counts.
    """
    head = model.get_output_embeddings()
    dtype = getattr(getattr(head, "weight", None), "dtype", hidden.dtype)
    if dtype.is_floating_point:  # else it is quantised, and takes any
        hidden = hidden.to(dtype)
    logits: Tensor = Transform.of(model)(head(hidden))
    return logits


TILE_ELEMENTS = 2**24
"""Logits that a CPU holds at a time: 64 MiB in float32."""
ON_GPU = (2**26, 2**29)
"""The fewest and the most that a GPU holds: fewer products, and fewer of a group that must be made
twice as it exceeds a tile. The most is 3,533 positions of 151,936 tokens."""
BYTES, SHARE = 8, 1 / 32
"""Of a logit with its copy in the dtype of products, and of the memory that is free, for them."""
ALIGNED = {"cuda": 8}
"""Logits that a row is filled up to a multiple of: products are slow on rows that begin at odd
places, as those of 50,257 or 32,001 bfloat16 do."""
COLUMNS = 512
"""Of the vocabulary, that a CPU multiplies at a time: with a few hundred positions, 512 rows of the
head stay in the second-level cache (measured: 160 GFLOP/s on two cores, 115 with all at once)."""

_kept = threading.local()


def tile_rows(head: Head) -> int:
    """Return how many positions a tile holds."""
    device = head.weight.device
    elements = _gpu_elements(device) if device.type == "cuda" else TILE_ELEMENTS
    return max(1, elements // len(head.weight))


@cache
def _gpu_elements(device: torch.device) -> int:
    """Look once, when a model is there and nothing else: a run's tiles are all of one size."""
    return elements_for(gpu_free_bytes(device))


def elements_for(free: float) -> int:
    """Return how many logits a GPU with so many bytes free holds at a time.

    A power of two: a little more or less memory, as from one start to the next, changes nothing.
    """
    fewest, most = ON_GPU
    fits = int(free * SHARE / BYTES)
    return min(most, max(fewest, 1 << max(0, fits.bit_length() - 1)))


def gpu_free_bytes(device: torch.device) -> float:
    """Return what this process may still take on a GPU, with what its allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + unused)


class _Memory:
    """Memory for one tile of logits; on a CPU the thread keeps it for the next.

    New pages would cost a fifth of the product that fills them; a GPU's allocator keeps its own.
    """

    def __init__(self, rows: int, head: Head) -> None:
        """Take `[rows, V]`, in float32 or wider; each row filled up to a multiple of `ALIGNED`."""
        device, step = head.weight.device, ALIGNED.get(head.weight.device.type, 1)
        width = -(-len(head.weight) // step) * step
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self._flat = getattr(_kept, "flat", None) if device.type == "cpu" else None
        _kept.flat = None  # a loss that scores something else takes memory of its own
        size = rows * width
        if self._flat is None or self._flat.dtype != dtype or self._flat.numel() < size:
            self._flat = torch.empty(size, dtype=dtype, device=device)
        self.logits = self._flat[:size].view(rows, width)

    def give_back(self) -> None:
        """Keep it for the thread's next tile."""
        if self._flat is not None and self._flat.device.type == "cpu":
            _kept.flat = self._flat


class Tile:
    """The logits of `n` positions; then, in the same memory, their probabilities less the targets'.

    Attributes:
        logps: float32 `[n]`, the log-prob of each target, in nats.
    """

    def __init__(self, head: Head, hidden: Tensor, target_ids: Tensor) -> None:
        """Score `hidden`, `[n, H]`, in the dtype of `head` (see `Head.cast`)."""
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
        """Scale and cap in place; keep the cap's slope, 1 − tanh², which the gradient needs."""
        scale, cap = self._head.transform.scale, self._head.transform.cap
        if scale != 1.0:
            self._residual.mul_(scale)
        if cap is not None:
            capped = self._residual.div_(cap).tanh_()
            self._slope = capped.square().neg_().add_(1)
            capped.mul_(cap)

    def _normalize(self) -> Tensor:
        """Turn logits into p − 1_t, and return the targets' log-probs.

        The largest probability is 1 / Σ exp(z − max): the log-sum-exp costs no pass of its own.
        """
        logits, targets = self._filled, self._targets[:, None]
        if logits.shape[1] > (vocabulary := len(self._head.weight)):
            logits[:, vocabulary:] = -torch.inf
        own, highest = logits.gather(1, targets)[:, 0], logits.amax(1)
        torch.softmax(logits, 1, out=logits)
        logps = own - highest + logits.amax(1).log()
        logits.scatter_add_(1, targets, torch.full_like(own, -1.0)[:, None])
        return logps

    @cached_property
    def _slopes(self) -> Tensor:
        """P − 1_t as the gradients need it: through the cap, in the dtype of the products."""
        if self._slope is not None:
            self._residual.mul_(self._slope)
        return self._filled.to(self._head.weight.dtype)[:, : len(self._head.weight)]

    def hidden_gradient(self, gradient: Tensor | None = None) -> Tensor:
        """Return d(Σ gradient · logps) / d hidden, `[n, H]`; with None, each row's own unscaled."""
        out = self._slopes @ self._head.weight
        factor = -self._head.transform.scale
        return out.mul_(factor if gradient is None else (gradient * factor)[:, None].to(out.dtype))

    def add_head_gradient(
        self, gradient: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> None:
        """Add d(Σ gradient · logps) / d weight and d bias to those sums, `[V, H]` and `[V]`."""
        slopes, factor = self._slopes, (gradient * -self._head.transform.scale)[:, None]
        if bias is not None:
            bias.add_((slopes.t() @ factor.to(slopes.dtype))[:, 0])
        if weight is None:
            return
        weighted = (self._hidden * factor).to(slopes.dtype)
        if weight.dtype == slopes.dtype:
            weight.addmm_(slopes.t(), weighted)
        elif weight.device.type == "cuda":  # no rounded product between: exact, and one pass less
            torch.addmm(weight, slopes.t(), weighted, out_dtype=weight.dtype, out=weight)
        else:
            weight.add_(slopes.t() @ weighted)
