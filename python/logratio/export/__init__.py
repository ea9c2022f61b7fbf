"""Export policy and reference as a bundle: one ONNX graph, verified against torch.

`export_bundle(ExportConfig(...))` is the Python form of `logratio export`.
"""

from logratio.export.export import ExportResult, export_bundle
from logratio.export.graph import GraphError
from logratio.export.parity import ParityError
from logratio.export.plan import ExportConfig, ExportError, plan_export
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
