"""Graphs made smaller and faster, with the same numbers."""

import hashlib
from typing import Any

import numpy as np


def smaller(model: Any) -> Any:
    """Store equal weights once, compute equal things once, drop what only debuggers read.

    The exporter's notes on nodes hold this machine's paths, and more bytes than a small model.
    """
    import onnx_ir.passes.common as passes

    _deduplicate(model.graph)
    for make_smaller in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        model = make_smaller(model).model
    _fold_transposes(model.graph)
    model.producer_name = "logratio"
    return model


def _deduplicate(graph: Any) -> None:
    """Store equal weights once: a fine-tune often leaves most of its reference as it was.

    (onnx_ir has a pass for it, which fails on weights that the exporter has transposed.)
    """
    first: dict[tuple[Any, ...], Any] = {}
    for name, value in list(graph.initializers.items()):
        weights = value.const_value.numpy()
        digest = hashlib.sha256(np.ascontiguousarray(weights).data).digest()
        kept = first.setdefault((weights.dtype, weights.shape, digest), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]


def _fold_transposes(graph: Any) -> None:
    """Store weights as MatMul reads them.

    The exporter folds the transpose of a weight with one reader only; here prompt and candidates
    both read it, and ONNX Runtime would keep a second, transposed copy of every weight.
    """
    for value in list(graph.initializers.values()):
        readers = [use.node for use in value.uses()]
        if not readers or any(node.op_type != "Transpose" for node in readers):
            continue
        orders = {tuple(node.attributes["perm"].as_ints()) for node in readers}
        if len(orders) == 1:
            _fold(graph, value, readers, orders.pop())


def _fold(graph: Any, value: Any, readers: list[Any], order: tuple[int, ...]) -> None:
    import onnx_ir

    weights, name = value.const_value, f"{value.name}.transposed"
    shape = onnx_ir.Shape([weights.shape[axis] for axis in order])

    def transposed() -> Any:
        return onnx_ir.tensor(np.ascontiguousarray(weights.numpy().transpose(order)), name=name)

    lazy = onnx_ir.LazyTensor(transposed, dtype=weights.dtype, shape=shape, name=name)
    folded = onnx_ir.Value(
        name=name, const_value=lazy, shape=shape, type=onnx_ir.TensorType(weights.dtype)
    )
    graph.register_initializer(folded)
    for node in readers:
        node.outputs[0].replace_all_uses_with(folded)
        node.graph.remove(node, safe=True)
    del graph.initializers[value.name]
