"""Gradients of a model on a fixed batch, and their comparison."""

from contextlib import nullcontext

import torch
from tiny_models import VOCABULARY
from torch import Tensor, nn

from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Batch
from logratio.logps.checks import batch_of
from logratio.logps.completion import score, transformer
from logratio.training.activations import LayerOptions, layer_options


def batch(layout: str = "shared", seed: int = 0) -> Batch:
    """Three ragged groups of two completions, beyond the window of the sliding families."""
    torch.manual_seed(seed)
    sizes = [(30, 14, 9), (1, 3, 20), (17, 5, 1)]
    ids = [[torch.randint(1, VOCABULARY, (n,)).tolist() for n in row] for row in sizes]
    return batch_of([(prompt, [first, second]) for prompt, first, second in ids], layout)


def gradients(
    model: nn.Module, kept: LayerOptions, layout: str = "shared"
) -> tuple[Tensor, list[Tensor]]:
    """Log-probs and all gradients of a weighted sum of them."""
    model.zero_grad(set_to_none=True)
    # The layout's attention stays until the backward pass, as it does in training.
    attention = shared_prompts(transformer(model)) if layout == "shared" else nullcontext()
    with attention, layer_options(model, kept):
        logps = score(model, batch(layout))
        (torch.linspace(-1, 1, len(logps)) * logps).sum().backward()
    return logps.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def assert_equal(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert len(one[1]) == len(other[1]) > 0
    assert all(map(torch.equal, one[1], other[1]))
