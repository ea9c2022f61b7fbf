"""Give a base model's graph inputs for LoRA adapters, and write an adapter for them.

One graph then serves many policies: each is a file with its adapter, of less than a hundredth of
the base's size. The inputs default to rank 0, with which the graph computes the base: that is the
reference. Hu et al. (2021), "LoRA", https://arxiv.org/abs/2106.09685, equation 3.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from torch import nn

from logratio.adapted_graph import RANK_INPUTS

_POLICY = "policy.model."
"""Prefix of the policy's weights in a graph."""
_PEFT = "base_model.model."
"""Prefix that peft gives the modules of the model that it wraps."""


def open_adapter_inputs(graph: Any) -> None:
    """Add the product of two inputs to every weight that the model's body multiplies by.

    The inputs have no values yet, so that no pass of the optimiser merges them: see
    `set_default_rank`.

    Args:
        graph: The graph of a policy, an `onnx_ir.Graph`, changed in place.
    """
    for weight in list(graph.initializers.values()):
        products = list(_products(graph, weight))
        if products:
            _open(graph, weight, products)


def _products(graph: Any, weight: Any) -> Iterator[Any]:
    """Yield the nodes of the body that multiply by a matrix; the head is in the graph of a loop."""
    if len(weight.const_value.shape) != 2 or not weight.name.endswith(".weight"):
        return
    for use in weight.uses():
        if use.node.op_type == "Transpose":
            users = list(use.node.outputs[0].uses())
            yield from (one.node for one in users if _multiplies(graph, one))
        elif _multiplies(graph, use):
            yield use.node


def _multiplies(graph: Any, use: Any) -> bool:
    return use.node.op_type in ("MatMul", "Gemm") and use.idx == 1 and use.node.graph is graph


def _open(graph: Any, weight: Any, products: list[Any]) -> None:
    """Add the inputs of one weight, and what they add to its products."""
    import onnx_ir

    stem = weight.name.removeprefix(_POLICY).removesuffix(".weight")
    size_in, size_out = _sizes(weight, products[0])
    rank = f"{stem}.rank"
    factors = []
    shapes: list[tuple[int | str, int | str]] = [(size_in, rank), (rank, size_out)]
    for end, shape in zip(RANK_INPUTS, shapes, strict=True):
        kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        factors.append(onnx_ir.Value(name=stem + end, shape=onnx_ir.Shape(shape), type=kind))
    graph.inputs.extend(factors)
    for product in products:
        _add_to(graph, product, factors)


def _sizes(weight: Any, product: Any) -> tuple[int, int]:
    """Return the sizes of a product's input and output."""
    first, second = (int(size) for size in weight.const_value.shape)
    transposed = product.attributes.get("transB")
    is_transposed = product.inputs[1] is not weight or bool(transposed and transposed.value)
    return (second, first) if is_transposed else (first, second)


def _add_to(graph: Any, product: Any, factors: list[Any]) -> None:
    """Add the adapter's part to a product; it is computed in float32."""
    import onnx_ir

    def new(operator: str, *inputs: Any, **attributes: Any) -> Any:
        made = onnx_ir.node(operator, inputs, attributes)
        added.append(made)
        return made.outputs[0]

    added: list[Any] = []
    result, states = product.outputs[0], product.inputs[0]
    half = onnx_ir.DataType.FLOAT16
    is_half = product.inputs[1].dtype == half
    if is_half:
        states = new("Cast", states, to=onnx_ir.DataType.FLOAT)
    part = new("MatMul", new("MatMul", states, factors[0]), factors[1])
    if is_half:
        part = new("Cast", part, to=half)
    total = new("Add", result, part)
    total.type, total.shape = result.type, result.shape
    result.replace_all_uses_with(total)
    added[-1].replace_input_with(0, result)
    graph.insert_after(product, added)


def set_default_rank(graph: Any) -> None:
    """Let the inputs of `open_adapter_inputs` default to rank 0, which adds nothing."""
    import onnx_ir

    for value in graph.inputs:
        if value.name.endswith(RANK_INPUTS):
            shape = [size if isinstance(size, int) else 0 for size in value.shape]
            value.const_value = onnx_ir.tensor(np.zeros(shape, np.float32), name=value.name)
            graph.register_initializer(value)


def adapter_weights(policy: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Return the factors of a peft model's adapter, by the names of the graph's inputs.

    Args:
        policy: A peft model for which `export.scorer.is_plain_lora` is true.

    Returns:
        For each adapted layer ``A``, float32 `[in, rank]`, and ``B``, float32 `[rank, out]`, which
        contains the adapter's scale.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for path, layer in policy.named_modules():
        if isinstance(layer, LoraLayer):
            found |= _factors(path.removeprefix(_PEFT), layer)
    return found


def _factors(stem: str, layer: Any) -> Mapping[str, NDArray[np.float32]]:
    (name,) = layer.lora_A.keys()
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
    factors = (one.detach().float().T.contiguous().numpy() for one in (down, up))
    return dict(zip((stem + end for end in RANK_INPUTS), factors, strict=True))
