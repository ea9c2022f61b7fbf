"""The inputs of a bundle's graph from a layout of candidates."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio.bundle import INPUTS

_PADDED = {"prompt": (1, 0), "candidate": (0, 1)}  # prompts are padded left, candidates right


def graph_inputs(layout: Any) -> dict[str, NDArray[np.int64]]:
    """Return the inputs of a graph, by name, from a `_rust.CandidateLayout`.

    A single position is padded to two: ONNX Runtime multiplies one row by a quantized matrix with
    another kernel, which rounds differently, so that a candidate of one token would get another
    reward alone than among others.
    """
    inputs = {name: getattr(layout, name) for name in INPUTS}
    for side, width in _PADDED.items():
        if inputs[f"{side}_ids"].size == 1:
            for name in (f"{side}_ids", f"{side}_mask"):
                inputs[name] = np.pad(inputs[name], ((0, 0), width))
    return inputs
