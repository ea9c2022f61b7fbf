"""Export policy and reference as a bundle: one ONNX graph, verified against torch.

`export_bundle(ExportConfig(...))` is the Python form of `logratio export`.
"""

from logratio.export.export import (
    ExportConfig,
    ExportError,
    ExportResult,
    export_bundle,
    plan_export,
)
from logratio.export.graph import GraphError
from logratio.export.parity import ParityError
from logratio.export.scorer import RewardScorer

__all__ = [
    "ExportConfig",
    "ExportError",
    "ExportResult",
    "GraphError",
    "ParityError",
    "RewardScorer",
    "export_bundle",
    "plan_export",
]
