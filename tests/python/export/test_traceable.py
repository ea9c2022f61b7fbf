"""Experts as a loop over all of them, and rotary embeddings without changing factors."""

from typing import Any

import pytest
import torch
from small_models import small_model
from torch import Tensor, nn

from logratio.export.traceable import EXPERT_SUM, sum_of_experts, traceable

LAYERS = {
    "mixtral": "gates and products of one matrix",
    "gpt_oss": "biases, transposed matrices and a gate of its own",
    "nemotron_h": "no gates",
}


def experts_of(kind: str) -> nn.Module:
    model = small_model(kind, 0)
    return next(module for module in model.modules() if hasattr(module, "is_transposed"))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_sum_over_all_experts_is_that_of_the_chosen_ones(kind: str) -> None:
    experts = experts_of(kind)
    width: Tensor = experts.down_proj  # type: ignore[assignment]
    hidden_size = width.shape[2 if experts.is_transposed else 1]
    torch.manual_seed(0)
    hidden = torch.randn(11, hidden_size)
    weights, chosen = torch.randn(11, int(experts.num_experts)).softmax(1).topk(2)  # type: ignore[arg-type]
    with torch.no_grad():
        own = experts(hidden, chosen, weights)
        found = sum_of_experts(experts, hidden, chosen, weights)
    torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)
    assert own.abs().max() > 0.1


def test_a_model_gets_its_experts_and_rotary_embeddings_back() -> None:
    model = small_model("mixtral", 0)
    rope: Any = next(module for module in model.modules() if hasattr(module, "rope_type"))
    rope.rope_type, before = "dynamic", model.config._experts_implementation
    with pytest.raises(KeyError), traceable(model):
        assert (rope.rope_type, model.config._experts_implementation) == ("default", EXPERT_SUM)
        raise KeyError
    assert (rope.rope_type, model.config._experts_implementation) == ("dynamic", before)
