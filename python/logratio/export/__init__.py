"""From trained models to a bundle: one ONNX graph of policy and reference, proved equal to torch.

`export_bundle(ExportConfig(...))` does what `logratio export` does.
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
