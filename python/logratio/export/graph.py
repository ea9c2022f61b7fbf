"""A scorer as an ONNX graph: each half traced, both joined, made smaller, written."""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logratio._rust import candidate_layout
from logratio.bundle import GRAPH, INPUTS, OUTPUTS, WEIGHTS
from logratio.errors import LogratioError
from logratio.export.scorer import HalfScorer, RewardScorer
from logratio.extras import require
from logratio.logps.completion import transformer
from logratio.training.fingerprint import IGNORED_CONFIG

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


OPSETS = (23, 20)
"""Tried in this order. 23 has attention, RMS norm and rotary embedding as operators of their own:
half the nodes and a quarter less time on a CPU."""
SINGLE_FILE_BYTES = 1_900_000_000
"""Larger weights stand in a file of their own: a protobuf message ends at 2 GiB."""

_TRACED = ([[5, 6, 7, 8, 9], [10, 11, 12]], [[[1, 2, 3, 4], [5, 6]], [[7], [8, 9, 10]]])
_TRACED_CHUNK = 4
_CHATTY = (
    "torch.__trace",
    "torch.onnx",
    "onnxscript",
    "onnx_ir",
    "torch.export",
    "torch._dynamo",
    "torch.fx",
)


class GraphError(LogratioError, RuntimeError):
    """The model cannot be written as an ONNX graph."""


def trace(scorer: RewardScorer, opset: int) -> Any:
    """Trace a scorer into an `onnx_ir.Model` with every dimension but the ranks left open.

    A model is traced once where policy and reference differ in their weights only.

    Raises:
        GraphError: torch or onnxscript cannot; with the cause.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    for module in ("onnx", "onnxscript"):
        require(module, "export")
    policy = _trace_half(scorer.policy, opset)
    twins = same_architecture(scorer.policy, scorer.reference)
    reference = policy.clone() if twins else _trace_half(scorer.reference, opset)
    model = joined(
        (policy, _weights(scorer.policy)), (reference, _weights(scorer.reference)), scorer.beta
    )
    with _quietly():
        return smaller(model)


def _trace_half(scorer: HalfScorer, opset: int) -> Any:
    """Trace one model; its weights become inputs, so that no constant is computed from them."""
    free = torch.export.Dim.DYNAMIC
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                scorer.eval(),
                _traced_inputs(),
                dynamo=True,
                opset_version=opset,
                input_names=list(INPUTS),
                output_names=["logps"],
                dynamic_shapes={name: dict.fromkeys(range(n), free) for name, n in INPUTS.items()},
                optimize=False,
                verbose=False,
            )
            assert program is not None
            open_weights(program.model.graph, scorer.state_dict().keys())
            program.optimize()
            return program.model
    except Exception as error:  # the exporter lets through whatever its passes raise
        raise GraphError(f"opset {opset}: {_cause(error)}") from error


def _weights(scorer: HalfScorer) -> dict[str, Any]:
    return {name: tensor.detach().numpy() for name, tensor in scorer.state_dict().items()}


def same_architecture(one: HalfScorer, other: HalfScorer) -> bool:
    """Tell whether two models differ in their weights only, so that one graph describes both."""
    shapes = [
        {name: tensor.shape for name, tensor in half.state_dict().items()} for half in (one, other)
    ]
    settings = [transformer(half.model).config.to_diff_dict() for half in (one, other)]
    for values in settings:
        for name in IGNORED_CONFIG:
            values.pop(name, None)
    is_adapted = one.model is other.model  # then one of them has its adapter off
    return not is_adapted and shapes[0] == shapes[1] and settings[0] == settings[1]


def write(model: Any, folder: Path, properties: Mapping[str, str]) -> list[str]:
    """Write a graph into a bundle's folder.

    Args:
        model: What `trace` returned.
        folder: Where to.
        properties: Stored in the graph.

    Returns:
        Names of the files: one, or two where the weights are too large for one.
    """
    import onnx_ir

    model.metadata_props.update(properties)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    is_large = weights > SINGLE_FILE_BYTES
    onnx_ir.save(model, folder / GRAPH, external_data=WEIGHTS if is_large else None)
    return [GRAPH, WEIGHTS] if is_large else [GRAPH]


def feed(layout: Any) -> dict[str, Any]:
    """Return a candidate layout as the graph's inputs."""
    return {name: getattr(layout, name) for name in INPUTS}


def _traced_inputs() -> tuple[Tensor, ...]:
    """Make a small example with no dimension of 1, which tracing would take for a constant."""
    prompts, candidates = _TRACED
    layout = candidate_layout(
        [np.array(ids, dtype=np.int32) for ids in prompts],
        [[np.array(ids, dtype=np.int32) for ids in group] for group in candidates],
        _TRACED_CHUNK,
    )
    return tuple(torch.from_numpy(array) for array in feed(layout).values())


def _cause(error: BaseException) -> str:
    """Find the sentence at the bottom of the exporter's pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's progress, warnings and advice off the terminal inside the block."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
