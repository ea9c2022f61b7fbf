"""From trained models to a bundle: one ONNX graph of policy and reference, proved equal to torch.

`export_bundle(ExportConfig(...))` does what `logratio export` does.
"""

from logratio.export.export import ExportConfig as ExportConfig
from logratio.export.export import ExportError as ExportError
from logratio.export.export import ExportResult as ExportResult
from logratio.export.export import export_bundle as export_bundle
from logratio.export.export import plan_export as plan_export
from logratio.export.scorer import RewardScorer as RewardScorer
