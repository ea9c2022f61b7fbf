"""A model's head: the matrix from hidden states to logits, and what its family does to them after.

`checks.check_head` compares every head with the model's own logits at start-up, so a family that is
missing here is refused, not guessed.
"""

from dataclasses import dataclass, replace
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
