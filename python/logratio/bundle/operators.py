"""The ONNX operators that a bundle's graph may contain: those that exports write, and no others.

Left out on purpose: ``Loop`` and ``If``, with which a graph could run for ever; ``ConstantOfShape``
and ``Tile``, with which a few bytes become gigabytes; and operators of other domains, some of which
read files.
"""

from collections.abc import Collection, Mapping

RUNTIME = "com.microsoft"
"""The operators of ONNX Runtime."""
DOMAINS: Mapping[str, Collection[int]] = {"": (20, 23), RUNTIME: (1,)}
"""The versions of each operator set that exports use; "" is ONNX's own."""

OPERATORS: Mapping[str, Collection[str]] = {
    "": frozenset(
        {
            # shapes and indexes
            *("Cast", "Concat", "Expand", "Range", "Reshape", "Shape", "Slice", "Split"),
            *("Squeeze", "Transpose", "Unsqueeze", "Where"),
            *("ArgMax", "Gather", "GatherElements", "GatherND", "Pad", "TopK", "Trilu"),
            *("ScatterElements", "ScatterND"),
            # arithmetic
            *("Abs", "Add", "Clip", "Cos", "CumSum", "Div", "Einsum", "Exp", "Max", "Min", "Mod"),
            *("Floor", "Log", "Mul", "Neg", "Pow", "Reciprocal", "Sign"),
            *("Sin", "Sqrt", "Sub", "ReduceMax", "ReduceMean", "ReduceSum"),
            # conditions
            *("And", "Equal", "Greater", "IsNaN", "Less", "LessOrEqual", "Not"),
            # layers
            *("Attention", "Conv", "Gelu", "Gemm", "LayerNormalization", "LogSoftmax", "MatMul"),
            *("RMSNormalization", "Relu", "RotaryEmbedding", "Sigmoid", "Softmax", "Softplus"),
            "Tanh",
            # loops over the chunks of the head and over experts, as long as their inputs
            "Scan",
        }
    ),
    RUNTIME: frozenset({"MatMulNBits"}),
}
"""The operators of each set."""

PADDED: Mapping[str, int] = {"Conv": 2**12}
"""Operators that may add padding to their input, and the largest number in their attributes."""

GROWING: Mapping[str, int] = {"Expand": 1, "Pad": 1, "Range": 1}
"""Operators whose result may be larger than their inputs, and which input gives its size."""
