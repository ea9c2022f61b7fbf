"""From trained models to a bundle: one ONNX graph of policy and reference, proved equal to torch.

`export_bundle(ExportConfig(...))` does what `logratio export` does.
"""

from logratio.scoring.export import ExportConfig as ExportConfig
from logratio.scoring.export import ExportError as ExportError
from logratio.scoring.export import ExportResult as ExportResult
from logratio.scoring.export import export_bundle as export_bundle
from logratio.scoring.export import plan_export as plan_export
from logratio.scoring.scorer import RewardScorer as RewardScorer
