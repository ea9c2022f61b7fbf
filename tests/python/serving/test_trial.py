"""A bundle is loaded in another process first: a slow, huge or crashing one harms only that."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from tiny_bundle import accept_files, copy_bundle, tiny_bundle, tiny_graph

from logratio.bundle import GRAPH, BundleError
from logratio.serving.session import within
from logratio.serving.trial import try_bundle

SIDE = 4000


def test_a_sound_bundle_gives_the_rewards_of_its_export(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    trial = try_bundle(tiny_bundle(tmp_path_factory) / "bundle")
    assert trial.groups == 6
    assert 0 <= trial.largest < 1e-4


def with_bomb(bundle: Path, model: onnx_ir.Model, bomb: list[onnx_ir.Node], result: Any) -> Path:
    """Add nodes to a bundle's graph, whose result is needed for the reward."""
    graph = model.graph
    reward = graph.outputs[0]
    zero = constant("zero", np.float32(0))
    total = onnx_ir.node("ReduceSum", [result], {"keepdims": 0})
    nothing = onnx_ir.node("Mul", [total.outputs[0], zero])
    added = onnx_ir.node("Add", [reward, nothing.outputs[0]])
    graph.register_initializer(zero)
    reward.name = "reward_before"
    output = added.outputs[0]
    output.name, output.type, output.shape = "reward", reward.type, reward.shape
    graph.extend([*bomb, total, nothing, added])
    graph.outputs[0] = output
    (bundle / GRAPH).unlink()
    onnx_ir.save(model, bundle / GRAPH)
    accept_files(bundle)
    return bundle


def constant(name: str, values: Any) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(np.asarray(values), name=name)
    return onnx_ir.Value(
        name=name,
        const_value=tensor,
        shape=onnx_ir.Shape(np.shape(values)),
        type=onnx_ir.TensorType(tensor.dtype),
    )


def square(model: onnx_ir.Model) -> onnx_ir.Node:
    """A matrix of ones, as large as the check of the file allows."""
    one, shape = constant("one", np.float32(1)), constant("square", np.array([SIDE, SIDE]))
    model.graph.register_initializer(one)
    model.graph.register_initializer(shape)
    return onnx_ir.node("Expand", [one, shape])


@pytest.mark.slow
def test_a_graph_that_computes_for_hours_when_it_is_opened_is_given_up(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle, model = copy_bundle(tmp_path_factory, tmp_path / "bundle"), tiny_graph(tmp_path_factory)
    bomb = [square(model)]
    for _ in range(2000):  # 128 GFLOP each
        bomb.append(onnx_ir.node("MatMul", [bomb[-1].outputs[0], bomb[0].outputs[0]]))
    with_bomb(bundle, model, bomb, bomb[-1].outputs[0])
    with pytest.raises(BundleError, match=r"did not open it within 4 s|did not load within 4 s"):
        try_bundle(bundle, seconds=4)


@pytest.mark.slow
def test_a_graph_that_needs_more_memory_than_there_is_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle, model = copy_bundle(tmp_path_factory, tmp_path / "bundle"), tiny_graph(tmp_path_factory)
    matrix, place = square(model), constant("column", np.array([-1, 1]))
    model.graph.register_initializer(place)
    column = onnx_ir.node("Reshape", [matrix.outputs[0], place])
    row = onnx_ir.node("Transpose", [column.outputs[0]], {"perm": [1, 0]})
    outer = onnx_ir.node("Add", [column.outputs[0], row.outputs[0]])  # 2**48 values
    with_bomb(bundle, model, [matrix, column, row, outer], outer.outputs[0])
    with pytest.raises(BundleError, match=r"cannot open it|memory|fails on a golden group"):
        try_bundle(bundle, seconds=60)


def test_a_process_that_fails_is_a_refusal(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = tiny_bundle(tmp_path_factory) / "bundle"
    with pytest.raises(BundleError, match=r"(with|more than) 0\.1 GiB"):
        try_bundle(bundle, memory_bytes=100 * 2**20)


def test_an_altered_bundle_is_refused_with_the_reason(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = copy_bundle(tmp_path_factory, tmp_path / "bundle")
    (bundle / GRAPH).write_bytes(b"junk")
    with pytest.raises(BundleError, match=r"scorer\.onnx: 4 bytes instead of"):
        try_bundle(bundle)


def test_waiting_ends_at_the_limit_and_errors_pass() -> None:
    import threading

    release = threading.Event()
    with pytest.raises(BundleError, match="too late"):
        within(0.05, release.wait, "too late")
    release.set()
    assert within(5, lambda: 3, "too late") == 3

    def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        within(5, fail, "too late")
