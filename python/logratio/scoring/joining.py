"""Two traced halves as one graph: the reward, the policy's sums, the reference's sums.

A half is a graph whose weights are inputs beside the ids. Tracing takes most of an export's time,
so two models of one architecture share a traced graph, which is copied and given other weights.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from logratio.bundle import INPUTS, OUTPUTS

Half = tuple[Any, Mapping[str, np.ndarray]]
"""An `onnx_ir.Model` with one output, and the values of the inputs that are weights."""


def open_weights(graph: Any, names: Collection[str]) -> None:
    """Turn a graph's weights into inputs, whose values no pass can rely on."""
    for name in list(graph.initializers):
        if name in names:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)


def joined(policy: Half, reference: Half, beta: float) -> Any:
    """Join two halves with the same ids; the policy's model is changed and returned."""
    import onnx_ir

    model, weights = policy
    graph = model.graph
    sums = [_close(graph, "policy", weights), _take_over(graph, *reference)]
    factor = onnx_ir.Value(name="beta", const_value=onnx_ir.tensor(np.float32(beta), name="beta"))
    factor.dtype, factor.shape = onnx_ir.DataType.FLOAT, onnx_ir.Shape([])
    graph.register_initializer(factor)
    logratio = onnx_ir.node("Sub", sums)
    reward = onnx_ir.node("Mul", [logratio.outputs[0], factor])
    graph.extend([logratio, reward])
    graph.outputs[:] = [reward.outputs[0], *sums]
    for value, name in zip(graph.outputs, OUTPUTS, strict=True):
        value.name, value.dtype, value.shape = name, sums[0].dtype, onnx_ir.Shape(["candidates"])
    return model


def _close(graph: Any, prefix: str, weights: Mapping[str, np.ndarray]) -> Any:
    """Give a half its weights and names of its own; return its output."""
    import onnx_ir

    for node in graph.all_nodes():
        node.name = f"{prefix}.{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}.{value.name}"
    for value in list(graph.initializers.values()):
        value.name = f"{prefix}.{value.name}"
    for value in [value for value in graph.inputs if value.name not in INPUTS]:
        graph.inputs.remove(value)
        value.const_value = onnx_ir.tensor(weights[value.name], name=value.name)
        value.name = f"{prefix}.{value.name}"
        graph.register_initializer(value)
    return graph.outputs[0]


def _take_over(graph: Any, other: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """Move another half's nodes and weights into `graph`; return its output there."""
    source = other.graph
    sums = _close(source, "reference", weights)
    for value, own in zip(source.inputs, graph.inputs, strict=True):
        value.replace_all_uses_with(own)
    source.outputs.clear()
    for name, value in list(source.initializers.items()):
        del source.initializers[name]
        graph.register_initializer(value)
    nodes = list(source)
    source.remove(nodes)
    graph.extend(nodes)
    return sums
