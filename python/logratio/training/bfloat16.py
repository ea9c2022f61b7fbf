"""Avoid repeated casts to bfloat16 of frozen weights and adapter inputs.

Autocast caches its bfloat16 copy of a weight only if the weight is trained. A frozen float32 weight
is cast at every use, and each copy stays in memory until the backward pass: `held_in_bfloat16`
casts it once. peft computes adapters in the dtype of their weights, float32, so the input and
output of every adapted layer are cast too: `with_bfloat16_adapters` computes in the input's dtype.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


def with_bfloat16_adapters(model: nn.Module) -> nn.Module:
    """Make the LoRA layers of `model` multiply in the dtype of their input, in place.

    The adapters' weights, gradients and moments stay float32. Variants of LoRA, such as DoRA, are
    not changed.

    Args:
        model: A peft model.

    Returns:
        The same model.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if not isinstance(module, LoraLayer) or module.lora_variant:
            continue
        pairs = (*module.lora_A.values(), *module.lora_B.values())
        for matrix in (matrix for matrix in pairs if type(matrix) is nn.Linear):
            matrix.__class__ = InputDtypeLinear
        if pairs:
            module.cast_input_dtype_enabled = False
            module.register_forward_pre_hook(_cast_once)
    return model


def _cast_once(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast a layer's input once for base and adapter; autocast would cast it twice."""
    if not inputs or inputs[0].dtype != torch.float32:
        return inputs
    first, *others = inputs
    if torch.is_autocast_enabled(kind := first.device.type):
        first = first.to(torch.get_autocast_dtype(kind))
    return first, *others


class InputDtypeLinear(nn.Linear):
    """A linear layer that multiplies in the dtype of its input, regardless of its weights'."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weightᵀ + bias` in the dtype of `input`, or in autocast's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return linear(input, self.weight.to(input.dtype), bias)


MATRICES = (nn.Linear, Conv1D)
"""Modules that only multiply by their weight, which autocast rounds at each use."""


def held_in_bfloat16(model: nn.Module) -> nn.Module:
    """Round weight matrices to bfloat16 once, in place, instead of by autocast at each use.

    Results under autocast are bit-identical. Matrices shared with another module (a head tied to
    the embeddings) or kept in float32 by the model family stay unchanged, as do biases, norms,
    embeddings, and experts stored as one tensor. Afterwards the model must run under autocast, and
    the rounded weights must not be trained.

    Args:
        model: A transformers model in float32.

    Returns:
        The same model.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    shared = {id(p) for m in model.modules() if type(m) not in MATRICES for p in _own_parameters(m)}
    for path, module in model.named_modules():
        if type(module) not in MATRICES or kept & set(path.split(".")):
            continue
        weight = module.weight
        if weight.dtype == torch.float32 and id(weight) not in shared:
            weight.data = weight.data.bfloat16()
    return model


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)
