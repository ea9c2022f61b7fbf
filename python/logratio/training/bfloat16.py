"""bfloat16 without needless casts: frozen matrices are held in it, adapters multiply in it.

Autocast keeps its copy of a weight for a whole pass only where the weight trains: a frozen one is
read in float32 and written in bfloat16 at every use, and the copy stays until the backward pass.
peft computes adapters in the dtype of their weights, which is float32, so that each input and
result of an adapted layer goes through float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


def with_low_adapters(model: nn.Module) -> nn.Module:
    """Let the LoRA layers of `model` multiply in the dtype of their input, in place.

    The adapters' weights stay float32, and so do their gradients and moments. Layers of another
    kind than plain LoRA (DoRA among them) compute as before.

    Args:
        model: a wrapper of peft.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if not isinstance(module, LoraLayer) or module.lora_variant:
            continue
        pairs = (*module.lora_A.values(), *module.lora_B.values())
        for matrix in (matrix for matrix in pairs if type(matrix) is nn.Linear):
            matrix.__class__ = LowLinear
        if pairs:
            module.cast_input_dtype_enabled = False
            module.register_forward_pre_hook(_cast_once)
    return model


def _cast_once(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let base and adapter of a layer share one copy of its input where autocast would make two."""
    if not inputs or inputs[0].dtype != torch.float32:
        return inputs
    first, *others = inputs
    if torch.is_autocast_enabled(kind := first.device.type):
        first = first.to(torch.get_autocast_dtype(kind))
    return first, *others


class LowLinear(nn.Linear):
    """A linear layer that multiplies in the dtype of its input, whatever its weights have."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weightᵀ + bias` in the dtype of `input`; under autocast, in its dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return linear(input, self.weight.to(input.dtype), bias)


MATRICES = (nn.Linear, Conv1D)
"""What multiplies by a weight and does nothing else with it: autocast rounds it at each use."""


def held_in_bfloat16(model: nn.Module) -> nn.Module:
    """Round the matrices that autocast would round at each use once, in place: the same bits.

    Matrices that another module shares (a head that is tied to the embeddings) or that the family
    keeps in float32 stay as they are, and so do biases, norms, embeddings and experts that are one
    tensor. The model must then run under autocast, and these weights must not train.

    Args:
        model: of transformers, float32.
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
