"""Compiled layers: the same numbers, one set of graphs for all layers and widths."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiled_graphs import graphs as graphs
from gradients import assert_equal, gradients
from tiny_models import FAMILIES, SIZES, tiny
from transformers import LlamaConfig

from logratio.logps.attention import shared_prompts
from logratio.logps.checks import batch_of
from logratio.logps.completion import score, transformer
from logratio.training import LoraSettings, TrainConfig, train
from logratio.training.activations import LayerOptions, layer_options
from logratio.training.lora import with_lora

pytestmark = [
    # torch looks at `.grad` of what it traces, and warns of that itself.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
COMPILED = (
    LayerOptions(compiled=True),
    LayerOptions(1, compiled=True),
    LayerOptions(2, offload=True, compiled=True),
)


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("kept", COMPILED)
def test_graphs_give_the_same_numbers(graphs: list[int], kept: LayerOptions, layout: str) -> None:
    model = tiny(FAMILIES["llama"]())
    plain = gradients(model, LayerOptions(), layout)
    assert not graphs
    assert_equal(plain, gradients(model, kept, layout))
    count = len(graphs)
    assert count
    assert_equal(plain, gradients(model, LayerOptions(), layout))
    assert len(graphs) == count, "plain layers are restored"


def test_adapters_are_compiled_too(graphs: list[int], tiny_model: Path) -> None:
    model = with_lora(tiny(FAMILIES["llama"]()), LoraSettings(rank=4), tiny_model)
    assert_equal(gradients(model, LayerOptions()), gradients(model, LayerOptions(1, compiled=True)))
    assert graphs


def test_layers_share_their_graphs_and_other_widths_make_none(graphs: list[int]) -> None:
    model = tiny(LlamaConfig(**{**SIZES, "num_hidden_layers": 5}))
    counts = []
    with shared_prompts(transformer(model)), layer_options(model, LayerOptions(compiled=True)):
        for prompt in (7, 30, 11, 64, 5, 23, 48):
            groups = [([3] * prompt, [[4] * (prompt // 2), [5] * 3])] * (prompt % 4 + 1)
            score(model, batch_of(groups, "shared")).sum().backward()
            counts.append(len(graphs))
    assert counts[-1] <= 4, "some before the attention, some after it"
    assert counts == [counts[0]] * len(counts)


def test_a_run_compiles_where_it_is_asked_to(
    graphs: list[int], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    config = TrainConfig(tiny_model, [pairs_file], tmp_path / "plain", lr=1e-3, batch_size=8)
    plain = train(config, show_progress=False).history
    assert not graphs
    compiled = replace(config, output=tmp_path / "compiled", compile_layers=True)
    assert train(compiled, show_progress=False).history == plain
    assert 0 < len(graphs) <= 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++ on a CPU")
def test_kernels_give_nearly_the_same_numbers() -> None:
    model = tiny(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    expected, grads = gradients(model, LayerOptions())
    torch.compiler.reset()
    found, others = gradients(model, LayerOptions(compiled=True))
    torch.compiler.reset()
    assert torch.allclose(found, expected, atol=1e-5)
    for one, other in zip(grads, others, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(one.norm()) + 1e-7
