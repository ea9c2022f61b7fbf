"""Replace parts of a model that cannot be traced by parts that compute the same.

Experts: transformers sends each token to its experts, whose numbers of tokens depend on the values.
Here each expert computes all tokens, and the sum is weighted by each token's shares, which are 0
for most experts. RoPE: families with dynamic factors compare the longest position with a limit.
Below it, which `families.check_exportable` ensures, the factors are constant. Recurrent layers: see
`recurrences`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from logratio.export.recurrences import chunked

EXPERT_SUM = "logratio_sum"
"""Name of `sum_of_experts` among transformers' implementations of experts."""
_EXPORTABLE_ATTENTION = ("sdpa", "eager")
_CONSTANT_ROPE = "default"


def use_exportable_attention(model: PreTrainedModel) -> None:
    """Select SDPA unless the model's attention can be exported; flash and flex cannot."""
    if model.config._attn_implementation not in _EXPORTABLE_ATTENTION:
        model.set_attn_implementation("sdpa")


@contextmanager
def traceable(model: PreTrainedModel) -> Iterator[None]:
    """Give a model experts and rotary embeddings that can be traced, and its own ones back."""
    ropes = [module for module in model.modules() if hasattr(module, "rope_type")]
    kinds = [rope.rope_type for rope in ropes]
    experts = _experts_of(model)
    try:
        for rope, kind in zip(ropes, kinds, strict=True):
            rope.rope_type = _constant(kind)
        if experts is not None:
            model.set_experts_implementation(EXPERT_SUM)
        with chunked(model):
            yield
    finally:
        for rope, kind in zip(ropes, kinds, strict=True):
            rope.rope_type = kind
        if experts is not None:
            model.set_experts_implementation(experts)


def _constant(kind: Any) -> Any:
    """Return the kind of RoPE whose factors do not change; some models have one per layer type."""
    return dict.fromkeys(kind, _CONSTANT_ROPE) if isinstance(kind, dict) else _CONSTANT_ROPE


def _experts_of(model: PreTrainedModel) -> Any:
    """Return the name of the model's implementation of experts; None if it has none to choose."""
    if not model._can_set_experts_implementation():
        return None
    return model.get_experts_implementation()


def sum_of_experts(
    experts: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute a layer of experts, one after the other for all tokens.

    Args:
        experts: The layer, with the attributes that `use_experts_implementation` gives it.
        hidden: States, `[T, H]`.
        top_k_index: The experts of each token, `[T, k]`.
        top_k_weights: Their shares, `[T, k]`.

    Returns:
        The weighted sum, `[T, H]`.
    """
    layer: Any = experts
    first = "gate_up_proj" if layer.has_gate else "up_proj"
    names = [first, "down_proj", *([f"{first}_bias", "down_proj_bias"] if layer.has_bias else [])]
    numbers = torch.arange(layer.num_experts).view(-1, 1, 1)
    shares = torch.where(top_k_index.unsqueeze(0) == numbers, top_k_weights.unsqueeze(0), 0.0)

    def add(total: Tensor, one: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        share, up, down, *biases = one
        up_bias, down_bias = biases or (None, None)
        states = _product(layer, hidden, up, up_bias)
        states = layer._apply_gate(states) if layer.has_gate else layer.act_fn(states)
        states = _product(layer, states, down, down_bias)
        if layer.has_post_expert_norm:
            states = layer.post_expert_norm(states)
        return total + states * share.unsqueeze(1), share.sum()

    weights = (shares.sum(2).to(hidden.dtype), *(getattr(layer, name) for name in names))
    total: Tensor = scan(add, torch.zeros_like(hidden), weights)[0]
    return total


def _product(layer: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = states @ (weight if layer.is_transposed else weight.t())
    return out if bias is None else out + bias


ALL_EXPERTS_FUNCTIONS.register(EXPERT_SUM, sum_of_experts)
