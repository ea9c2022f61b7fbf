"""Trace a scorer's two models to ONNX, join the graphs, optimise and write them."""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logratio._rust import candidate_layout
from logratio.bundle import (
    CACHED_REFERENCE,
    GRAPH,
    INPUTS,
    OUTPUTS,
    PADDED,
    REFERENCE_INPUT,
    TOKEN_LOGPS,
    TOKEN_LOGRATIOS,
    WEIGHTS,
)
from logratio.errors import LogratioError
from logratio.export.adapter_inputs import open_adapter_inputs, set_default_rank
from logratio.export.families import layout_of
from logratio.export.reward_model import ScoreScorer
from logratio.export.scorer import HalfScorer, PolicyScorer, RewardScorer
from logratio.extras import require
from logratio.graph_inputs import graph_inputs
from logratio.logps.completion import transformer
from logratio.training.fingerprint import IGNORED_CONFIG

Scorer = RewardScorer | PolicyScorer | ScoreScorer
"""What can be traced to a graph."""
Half = tuple[Any, Mapping[str, np.ndarray]]
"""An `onnx_ir.Model` whose first output is `[N]`, and the values of its weight inputs."""


def open_weights(graph: Any, names: Collection[str]) -> None:
    """Turn a graph's weights into inputs, so that no optimisation pass uses their values."""
    for name in list(graph.initializers):
        if name in names:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)


def joined(policy: Half, reference: Half, beta: float) -> Any:
    """Join the graphs of policy and reference, which share inputs; modifies the policy's."""
    model, weights = policy
    graph = model.graph
    sums, per_token = _restore_weights(graph, "policy", weights)
    others, others_per_token = _move_into(graph, *reference)
    reward = _scaled(graph, _new(graph, "Sub", sums, others), beta)
    _set_outputs(graph, [reward, sums, others], sums.dtype)
    _add_token_output(graph, TOKEN_LOGRATIOS, _new(graph, "Sub", per_token, others_per_token))
    return model


def alone(policy: Half, scorer: PolicyScorer) -> Any:
    """Complete the graph of a policy to that of its reward; modifies it."""
    import onnx_ir

    model, weights = policy
    graph = model.graph
    sums, per_token = _restore_weights(graph, "policy", weights)
    measure = sums
    if scorer.kind == CACHED_REFERENCE:
        known = onnx_ir.Value(name=REFERENCE_INPUT, shape=onnx_ir.Shape(["candidates"]))
        known.type = onnx_ir.TensorType(sums.dtype)
        graph.inputs.append(known)
        measure = _new(graph, "Sub", sums, known)
    elif scorer.normalized:
        mask = next(value for value in graph.inputs if value.name == "candidate_mask")
        axis = _constant(graph, "token_axis", np.array([1]))
        tokens = _new(graph, "ReduceSum", mask, axis, keepdims=0)
        divisor = _new(graph, "Cast", tokens, to=onnx_ir.DataType.FLOAT)
        measure = _new(graph, "Div", sums, divisor)
    _set_outputs(graph, [_scaled(graph, measure, scorer.beta), sums], sums.dtype)
    _add_token_output(graph, TOKEN_LOGPS, per_token)
    return model


def with_weights(half: Half) -> Any:
    """Return the graph of a reward model with its weights; modifies it."""
    model, weights = half
    (scores,) = _restore_weights(model.graph, "policy", weights)
    _set_outputs(model.graph, [scores], scores.dtype)
    return model


def _new(graph: Any, operator: str, *values: Any, **attributes: int) -> Any:
    """Append a node and return its output."""
    import onnx_ir

    node = onnx_ir.node(operator, values, attributes)
    graph.append(node)
    return node.outputs[0]


def _constant(graph: Any, name: str, value: np.ndarray | np.generic) -> Any:
    """Add a named constant."""
    import onnx_ir

    tensor = onnx_ir.tensor(value, name=name)
    shape, kind = onnx_ir.Shape(value.shape), onnx_ir.TensorType(tensor.dtype)
    constant = onnx_ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    graph.register_initializer(constant)
    return constant


def _scaled(graph: Any, value: Any, beta: float) -> Any:
    return _new(graph, "Mul", value, _constant(graph, "beta", np.float32(beta)))


def _set_outputs(graph: Any, values: Sequence[Any], dtype: Any) -> None:
    """Make values the outputs of a graph, under the first of their names in a bundle."""
    import onnx_ir

    graph.outputs[:] = values
    for value, name in zip(values, OUTPUTS, strict=False):
        value.name, value.dtype, value.shape = name, dtype, onnx_ir.Shape(["candidates"])


def _add_token_output(graph: Any, name: str, value: Any) -> None:
    import onnx_ir

    value.name, value.dtype = name, graph.outputs[0].dtype
    value.shape = onnx_ir.Shape(["chunks", "chunk"])
    graph.outputs.append(value)


def _restore_weights(graph: Any, prefix: str, weights: Mapping[str, np.ndarray]) -> list[Any]:
    """Turn a half's inputs back into weights, prefix all names, and return its outputs."""
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
    return list(graph.outputs)


def _move_into(graph: Any, other: Any, weights: Mapping[str, np.ndarray]) -> list[Any]:
    """Move another half's nodes and weights into `graph`; return its outputs there."""
    source = other.graph
    outputs = _restore_weights(source, "reference", weights)
    for value, shared in zip(source.inputs, graph.inputs, strict=True):
        value.replace_all_uses_with(shared)
    source.outputs.clear()
    for name, value in list(source.initializers.items()):
        del source.initializers[name]
        graph.register_initializer(value)
    nodes = list(source)
    source.remove(nodes)
    graph.extend(nodes)
    return outputs


def smaller(model: Any) -> Any:
    """Remove duplicate weights, common subexpressions and debug metadata.

    The exporter's metadata contains paths of this machine, and may be larger than a small model.
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
    _replace_fills(model.graph)
    model.producer_name = "logratio"
    return model


def _deduplicate(graph: Any) -> None:
    """Store equal weights once: policy and reference often share most of them.

    The pass of onnx_ir fails on weights that the exporter has transposed.
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
    """Store weights in the layout that MatMul reads.

    The exporter folds the transpose of a weight only if it has one reader. Here prompt and
    candidates both read it, and ONNX Runtime would keep a second, transposed copy.
    """
    for value in list(graph.initializers.values()):
        readers = [use.node for use in value.uses()]
        if not readers or any(node.op_type != "Transpose" for node in readers):
            continue
        orders = {tuple(node.attributes["perm"].as_ints()) for node in readers}
        if len(orders) == 1:
            _fold(graph, value, readers, orders.pop())


def _replace_fills(graph: Any) -> None:
    """Replace `ConstantOfShape`, which no bundle may contain, by `Expand`."""
    import onnx_ir

    for number, node in enumerate([n for n in graph.all_nodes() if n.op_type == "ConstantOfShape"]):
        given = node.attributes.get("value")
        value = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
        fill = _constant(graph, f"fill.{number}", np.array(value).reshape(()))
        expanded = onnx_ir.node("Expand", [fill, node.inputs[0]])
        old, new = node.outputs[0], expanded.outputs[0]
        new.type, new.shape, name = old.type, old.shape, old.name
        node.graph.insert_before(node, expanded)
        onnx_ir.convenience.replace_all_uses_with(old, new)
        node.graph.remove(node, safe=True)
        new.name = name


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
"""Tried in this order. Opset 23 has operators for attention, RMS norm and rotary embedding: half
the nodes and a quarter less time on a CPU."""
SINGLE_FILE_BYTES = 1_900_000_000
"""Larger weights go to a separate file, since a protobuf message is limited to 2 GiB."""

_TRACED = ([[5, 6, 7, 8, 9], [10, 11, 12]], [[[1, 2, 3, 4], [5, 6]], [[7], [8, 9, 10]]])
_REPEATED = 40
"""Times that the prompts are repeated in rows of their own: longer than a recurrent layer's chunk,
since a single chunk would become a constant."""
_TRACED_CHUNK = 4
_ERRORS_ONLY = 3
_NOISY_LOGGERS = (
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


def trace(scorer: Scorer, opset: int, *, takes_adapters: bool = False) -> Any:
    """Trace a scorer into an `onnx_ir.Model` with dynamic dimensions.

    Policy and reference are traced once if they differ only in their weights.

    Args:
        scorer: Policy and reference, a policy, or a reward model.
        opset: The ONNX opset.
        takes_adapters: Give the graph of a policy inputs for adapters.

    Raises:
        GraphError: torch or onnxscript cannot export the model; the message gives the cause.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    for module in ("onnx", "onnxscript"):
        require(module, "export")
    if isinstance(scorer, ScoreScorer):
        model = with_weights(_half(scorer, opset))
    elif isinstance(scorer, PolicyScorer):
        model = alone(_half(scorer.policy, opset), scorer)
        if takes_adapters:
            open_adapter_inputs(model.graph)
    else:
        model = _trace_pair(scorer, opset)
    with _quietly():
        model = smaller(model)
    if takes_adapters:
        set_default_rank(model.graph)
    return model


def _trace_pair(scorer: RewardScorer, opset: int) -> Any:
    policy, weights = _half(scorer.policy, opset)
    twins = same_architecture(scorer.policy, scorer.reference)
    reference = policy.clone() if twins else _trace_half(scorer.reference, opset)
    return joined((policy, weights), (reference, _weights(scorer.reference)), scorer.beta)


def _half(scorer: HalfScorer | ScoreScorer, opset: int) -> Half:
    return _trace_half(scorer, opset), _weights(scorer)


def _trace_half(scorer: HalfScorer | ScoreScorer, opset: int) -> Any:
    """Trace one model with its weights as inputs, so that no constant depends on them."""
    free, is_scored = torch.export.Dim.DYNAMIC, isinstance(scorer, ScoreScorer)
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                scorer.eval(),
                _traced_inputs(layout_of(transformer(scorer.model).config)),
                dynamo=True,
                opset_version=opset,
                input_names=list(INPUTS),
                output_names=["logps", "token_logps"][: 1 if is_scored else 2],
                dynamic_shapes={name: dict.fromkeys(range(n), free) for name, n in INPUTS.items()},
                optimize=False,
                verbose=False,
            )
            assert program is not None
            open_weights(program.model.graph, scorer.state_dict().keys())
            program.optimize()
            return program.model
    except Exception as error:  # the exporter raises the errors of its passes unchanged
        raise GraphError(f"opset {opset}: {_cause(error)}") from error


def _weights(scorer: HalfScorer | ScoreScorer) -> dict[str, Any]:
    return {name: tensor.detach().numpy() for name, tensor in scorer.state_dict().items()}


def same_architecture(one: HalfScorer, other: HalfScorer) -> bool:
    """Return whether two models differ only in their weights, so that one trace serves both."""
    shapes = [
        {name: tensor.shape for name, tensor in half.state_dict().items()} for half in (one, other)
    ]
    settings = [transformer(half.model).config.to_diff_dict() for half in (one, other)]
    for values in settings:
        for name in IGNORED_CONFIG:
            values.pop(name, None)
    is_adapted = one.model is other.model  # then one of them disables its adapter
    return not is_adapted and shapes[0] == shapes[1] and settings[0] == settings[1]


def write(model: Any, folder: Path, properties: Mapping[str, str]) -> list[str]:
    """Write a graph into a bundle's folder.

    Args:
        model: The model that `trace` returned.
        folder: The folder.
        properties: Metadata to store in the graph.

    Returns:
        Names of the files: one, or two if the weights are too large for one.
    """
    import onnx_ir

    model.metadata_props.update(properties)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    is_large = weights > SINGLE_FILE_BYTES
    onnx_ir.save(model, folder / GRAPH, external_data=WEIGHTS if is_large else None)
    return [GRAPH, WEIGHTS] if is_large else [GRAPH]


def open_graph(path: Path) -> Any:
    """Open a graph on the CPU.

    Raises:
        GraphError: ONNX Runtime cannot open it.
    """
    runtime = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises many unrelated types
        raise GraphError(f"ONNX Runtime cannot open it: {str(error).strip()[:200]}") from error


def _traced_inputs(kind: str) -> tuple[Tensor, ...]:
    """Return a small example; no dimension is 1, which tracing would treat as constant."""
    prompts, candidates = _TRACED
    times = _REPEATED if kind == PADDED else 1
    layout = candidate_layout(
        [np.array(ids * times, dtype=np.int32) for ids in prompts],
        [[np.array(ids, dtype=np.int32) for ids in group] for group in candidates],
        _TRACED_CHUNK,
    )
    return tuple(torch.from_numpy(array) for array in graph_inputs(layout).values())


def _cause(error: BaseException) -> str:
    """Return the first line of the root cause: the exporter wraps it in long advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the exporter's output, warnings and log messages."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
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
