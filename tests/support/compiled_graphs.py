"""Counting the graphs that torch.compile makes."""

from collections.abc import Callable, Iterator

import pytest
import torch

from logratio.training import activations


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile without making kernels; the list gets an item for every graph."""
    made: list[int] = []

    def count(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        made.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(activations, "COMPILER", count)
    monkeypatch.setattr(activations, "WORTH_MOVING", 0)
    torch.compiler.reset()
    yield made
    torch.compiler.reset()
