"""A scorer as an ONNX graph: each half traced, both joined, made smaller, written."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logratio._rust import candidate_layout
from logratio.bundle import GRAPH, INPUTS, WEIGHTS
from logratio.errors import LogratioError
from logratio.extras import require
from logratio.logps.completion import transformer
from logratio.scoring.joining import joined, open_weights
from logratio.scoring.scorer import HalfScorer, RewardScorer
from logratio.scoring.shrinking import smaller
from logratio.training.canonical import IGNORED_CONFIG

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
