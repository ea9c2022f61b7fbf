"""Store a graph's weights in fewer bits: bfloat16, or blocks of 8 or 4 bits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from logratio.bundle import Precision
from logratio.bundle.operators import RUNTIME
from logratio.errors import LogratioError
from logratio.extras import require

BLOCK_SIZE = 32
"""Values that share a scale and a zero point. Larger blocks save little and are less accurate."""
ADAPTER_WEIGHT = "lora_"
"""Part of the names of an adapter's weights, which stay in float32: they are few, and they are the
difference between policy and reference."""


class QuantizationError(LogratioError, RuntimeError):
    """The weights of a graph cannot be quantized."""


def to_half(model: nn.Module) -> None:
    """Convert a model's parameters to float16 in place, except those of an adapter.

    Buffers keep their type: the frequencies of rotary embeddings need float32.
    """
    for name, parameter in model.named_parameters():
        if ADAPTER_WEIGHT not in name:
            parameter.data = parameter.data.half()


def store_weights(model: Any, precision: Precision) -> float:
    """Store a graph's weights as a precision asks, and return the share in less than 32 bits.

    Raises:
        QuantizationError: A matrix could not be quantized; the message names it.
    """
    if precision.bits is not None:
        quantize(model, precision.bits)
    elif precision.dtype == "bfloat16":
        store_as_bfloat16(model)
    return stored_share(model)


def store_as_bfloat16(model: Any) -> None:
    """Store a graph's matrices as bfloat16, widened to float32 before they are used.

    ONNX Runtime's CPU provider computes nothing in bfloat16, but can convert from it. The weights
    of a model that was trained in bfloat16 are stored without loss.
    """
    import onnx_ir

    graph = model.graph
    first = graph[0]
    for value in list(_matrices(graph)):
        stored = _converted(value)
        cast = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT})
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[value.name]
        graph.register_initializer(stored)
        graph.insert_before(first, cast)


def _converted(value: Any) -> Any:
    """Return a weight as a new one in bfloat16, converted when the graph is written."""
    import onnx_ir

    kind, name, weights = onnx_ir.DataType.BFLOAT16, f"{value.name}.bfloat16", value.const_value
    lazy = onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(weights.numpy().astype(kind.numpy()), name=name),
        dtype=kind,
        shape=value.shape,
        name=name,
    )
    return onnx_ir.Value(
        name=name, const_value=lazy, shape=value.shape, type=onnx_ir.TensorType(kind)
    )


def _matrices(graph: Any) -> Iterator[Any]:
    """Yield the float32 weights with two or more dimensions, except those of an adapter."""
    import onnx_ir

    for name, value in graph.initializers.items():
        weights = value.const_value
        is_matrix = weights.dtype == onnx_ir.DataType.FLOAT and len(weights.shape) > 1
        if is_matrix and ADAPTER_WEIGHT not in name:
            yield value


def quantize(model: Any, bits: int) -> None:
    """Quantize the matrices that a graph multiplies by, in blocks of `BLOCK_SIZE` values.

    Only weights are quantized (`MatMulNBits`). Quantized activations would take their scale from
    the whole batch, so that a candidate's reward would depend on the others.

    Args:
        model: The `onnx_ir.Model`, changed in place.
        bits: 8 or 4.

    Raises:
        QuantizationError: A matrix could not be quantized; the message names it.
    """
    require("onnxruntime", "export")
    graph, stored = model.graph, {}
    for node in list(graph.all_nodes()):
        if weight := _multiplied(node):
            key = (weight.name, _is_transposed(node))
            if key not in stored:
                stored[key] = _Blocks(graph, weight, bits, transposed=key[1])
            stored[key].replace(node)
    for value in list(_matrices(graph)):
        if not value.uses():
            del graph.initializers[value.name]
    _check_quantized(graph)
    model.opset_imports[RUNTIME] = 1


def _multiplied(node: Any) -> Any | None:
    """Return the weight that a node multiplies by, if it is to be quantized."""
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or ADAPTER_WEIGHT in weight.name:
        return None
    return weight if len(weight.const_value.shape) == 2 else None


def _is_transposed(node: Any) -> bool:
    return bool(_attribute(node, "transB", 0))


def _attribute(node: Any, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


class _Blocks:
    """A weight in blocks: its packed values, scales and zero points, stored once."""

    def __init__(self, graph: Any, weight: Any, bits: int, *, transposed: bool) -> None:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

        values = weight.const_value.numpy()
        values = np.ascontiguousarray(values.T if transposed else values)
        settings = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK_SIZE, is_symmetric=False, bits=bits
        )
        parts = DefaultWeightOnlyQuantizer(settings).qbits_block_quant(values)
        end = ".transposed" if transposed else ""
        self._inputs = [
            _register(graph, f"{weight.name}{end}.{part}", array)
            for part, array in zip(("packed", "scales", "zero_points"), parts, strict=True)
        ]
        rows, columns = values.shape
        self._attributes = {"K": rows, "N": columns, "bits": bits, "block_size": BLOCK_SIZE}

    def replace(self, node: Any) -> None:
        """Replace a node by the product with these blocks."""
        import onnx_ir

        if any(_attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")):
            raise QuantizationError(f"{node.name}: a product with a factor cannot be quantized")
        product = onnx_ir.node(
            "MatMulNBits", [node.inputs[0], *self._inputs], self._attributes, domain=RUNTIME
        )
        nodes, bias = [product], node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            nodes.append(onnx_ir.node("Add", [product.outputs[0], bias]))
        old, new = node.outputs[0], nodes[-1].outputs[0]
        product.outputs[0].type = new.type = old.type
        new.shape = old.shape
        node.graph.insert_before(node, nodes)
        name = old.name
        onnx_ir.convenience.replace_all_uses_with(old, new)
        outputs = node.graph.outputs
        outputs[:] = [new if value is old else value for value in outputs]
        node.graph.remove(node, safe=True)
        new.name = name


def _register(graph: Any, name: str, array: np.ndarray) -> Any:
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    shape, kind = onnx_ir.Shape(array.shape), onnx_ir.TensorType(tensor.dtype)
    value = onnx_ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    graph.register_initializer(value)
    return value


def _check_quantized(graph: Any) -> None:
    """Check that no matrix is left except tables of embeddings, which are only looked up."""
    for value in _matrices(graph):
        readers = {use.node.op_type for use in value.uses()}
        if readers - {"Gather", "MatMulNBits"}:  # tables, and scales
            raise QuantizationError(
                f"{value.name} is read by {', '.join(sorted(readers))} and cannot be quantized"
            )


def stored_share(model: Any) -> float:
    """Return the share of a graph's weights that are stored in less than 32 bits."""
    import onnx_ir

    small = large = 0.0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name.endswith((".scales", ".zero_points")) or tensor.dtype == onnx_ir.DataType.INT64:
            continue
        packed = name.endswith(".packed")
        count = _unpacked(value) if packed else tensor.size
        if packed or tensor.dtype.itemsize < onnx_ir.DataType.FLOAT.itemsize:
            small += count
        else:
            large += count
    return small / max(small + large, 1.0)


def _unpacked(value: Any) -> int:
    """Return the number of weights in the packed values of a product."""
    attributes = next(iter(value.uses())).node.attributes
    return int(attributes["K"].as_int() * attributes["N"].as_int())
