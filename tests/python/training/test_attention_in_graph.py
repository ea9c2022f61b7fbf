"""Compiled layers with their attention inside the graph, as on a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from compiled_graphs import graphs as graphs
from layout_oracle import store_of
from oracle import in_float64, per_token_logps
from random_groups import random_groups, token_groups
from tiny_models import FAMILIES, tiny
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from traceable_varlen import in_one_call as in_one_call

from logratio.data.feed import lay_out
from logratio.logps.attention import fused, shared_prompts
from logratio.logps.attention.kernels import Choice, Kernel, Wanted
from logratio.logps.batch import Batch, SharedBatch, shape_for, to_torch
from logratio.logps.completion import score, target_states, transformer
from logratio.training import activations
from logratio.training.activations import LayerOptions, layer_options

pytestmark = [
    # torch looks at `.grad` of what it traces, and warns of that itself.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def no_breaks_before() -> Iterator[None]:
    counters.clear()
    yield
    counters.clear()


def as_on_a_gpu(groups: Any, device: str = "cpu", layout: str = "shared") -> Batch:
    """A batch with the arrays that CUDA gets."""
    shape = shape_for("shared", "cuda")
    return to_torch(lay_out(store_of(groups), np.arange(len(groups)), layout, **shape), device)


def with_roles(groups: Any) -> Any:
    return [(prompt, [(ids, [1] * len(ids), 2) for ids in answers]) for prompt, answers in groups]


def gradients(model: nn.Module, batch: Batch, kept: LayerOptions) -> tuple[Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    with shared_prompts(transformer(model)), layer_options(model, kept):
        logps = score(model, batch)
        (torch.linspace(-1, 1, len(logps)) * logps).sum().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach(), torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_graph_with_attention_equals_plain_layers_and_the_oracle(
    family: str, graphs: list[int], in_one_call: list[Wanted]
) -> None:
    model, groups = tiny(FAMILIES[family]()), token_groups()
    kept = LayerOptions(1, compiled=True)  # one layer twice, and one once
    batch = as_on_a_gpu(with_roles(groups))
    plain, expected = gradients(model, batch, LayerOptions())
    assert not graphs
    found, truth = gradients(model, batch, kept)
    assert graphs and not counters["graph_break"]
    assert torch.equal(found, plain)
    assert torch.equal(truth, expected)
    oracle = in_float64(model)
    exact = per_token_logps(oracle, groups)
    (torch.linspace(-1, 1, len(exact), dtype=torch.float64) * exact).sum().backward()
    assert float((found.double() - exact).detach().abs().max()) <= 1e-5
    own = torch.cat([p.grad.flatten() for p in oracle.parameters() if p.grad is not None])
    assert float((truth.double() - own).norm() / own.norm()) <= 1e-5


def test_layers_and_batches_share_graphs_that_nothing_interrupts(
    graphs: list[int], in_one_call: list[Wanted]
) -> None:
    model = tiny(FAMILIES["llama"]())
    for seed in range(4):
        gradients(model, as_on_a_gpu(random_groups(seed)[: 2 + seed]), LayerOptions(compiled=True))
    assert len(graphs) <= 2, "sizes become symbols at the second batch"
    assert not counters["graph_break"]
    assert len(in_one_call) <= 2 * len(graphs), "kernels are chosen when a layer is traced"


Compiled = tuple[list[str], list[str]]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """Trace forward and backward graphs; return the names of the operators of each."""
    forward, backward = list[str](), list[str]()

    def keep(names: list[str]) -> Callable[..., object]:
        def made(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
            names.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        return made

    backend = aot_autograd(fw_compiler=keep(forward), bw_compiler=keep(backward))
    monkeypatch.setattr(activations, "COMPILER", backend)
    torch.compiler.reset()
    yield forward, backward
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
@pytest.mark.parametrize(
    ("kernel", "name"), [("varlen", "_varlen_attn"), ("merged", "_flash_attention")]
)
def test_torchs_own_kernels_are_in_both_graphs(
    kernel: Kernel, name: str, operators: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without values, which take the real operators: nothing interrupts the graph."""
    monkeypatch.setattr(fused, "choose", lambda *_: Choice(kernel, ()))
    monkeypatch.setattr(fused, "_dtype", lambda states: states.dtype)  # it has no autocast
    model = tiny(FAMILIES["llama"]())
    nn.Module.to(model, "meta", torch.bfloat16)
    with shared_prompts(model), layer_options(model, LayerOptions(compiled=True)):
        for seed in range(2):
            batch = as_on_a_gpu(random_groups(seed), "meta")
            target_states(model, batch).sum().backward()
    forward, backward = operators
    assert any(name in operator and "backward" not in operator for operator in forward)
    assert any(name in operator and "backward" in operator for operator in backward)
    assert not counters["graph_break"]


@pytest.mark.parametrize("layout", ["shared", "tree"])
def test_other_kernels_interrupt_the_graph(layout: str, graphs: list[int]) -> None:
    model = tiny(FAMILIES["llama"]())
    batch = as_on_a_gpu(random_groups(0), layout=layout)
    assert isinstance(batch, SharedBatch) == (layout == "shared")
    plain, expected = gradients(model, batch, LayerOptions())
    found, truth = gradients(model, batch, LayerOptions(compiled=True))
    assert graphs and counters["graph_break"]
    assert torch.equal(found, plain) and torch.equal(truth, expected)
