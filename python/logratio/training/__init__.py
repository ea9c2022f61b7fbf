"""Preference optimisation in plain torch: the trainer, losses, the reference, evaluation.

`DPOTrainer(model, data, output=…).train()` and `train(TrainConfig(...))` do what `logratio train`
does; the parts can be used alone.
"""

from logratio.data.analysis.evaluation_result import Evaluation, KlEstimate
from logratio.logps.checks import UnsupportedModelError
from logratio.logps.completion import completion_logps
from logratio.training.callbacks import Callback, CallbackError, RunState
from logratio.training.checkpoint import ResumeError, RunInterruptedError
from logratio.training.checkpoint_folder import SaveError
from logratio.training.cluster import Cluster, ClusterForecast
from logratio.training.cluster_plan import plan_cluster
from logratio.training.config import (
    EvaluateConfig,
    LoraSettings,
    PrecomputeConfig,
    SFTConfig,
    SweepConfig,
    TrainConfig,
)
from logratio.training.dataset import VocabularyError
from logratio.training.evaluation import Sample, evaluate
from logratio.training.held_out import HeldOutResult
from logratio.training.lora import read_lora_config
from logratio.training.memory import MemoryShortageError
from logratio.training.merging import MergeError, MergeResult, merge_adapter
from logratio.training.methods.free import sft_loss, simpo_loss
from logratio.training.methods.logps import GroupLogps, PairLogps
from logratio.training.methods.margins import dpo_loss
from logratio.training.methods.method import Method, Option
from logratio.training.methods.pairs import ipo_loss
from logratio.training.methods.table import METHODS
from logratio.training.metrics import NonFiniteError
from logratio.training.models import DeviceError, ModelFolderError, QuantizationError, load_model
from logratio.training.precomputation import PrecomputeResult, ShareError, precompute
from logratio.training.reference import ImpossibleLogpError, StaleCacheError
from logratio.training.reference_checks import UntrustedReferenceError
from logratio.training.run_folder import RunExistsError, TrainResult
from logratio.training.stages import train_stages
from logratio.training.sweep_results import SweepResult, SweepRow
from logratio.training.sweep_runs import sweep
from logratio.training.trainer import DPOTrainer, train

__all__ = [
    "METHODS",
    "Callback",
    "CallbackError",
    "Cluster",
    "ClusterForecast",
    "DPOTrainer",
    "DeviceError",
    "EvaluateConfig",
    "Evaluation",
    "GroupLogps",
    "HeldOutResult",
    "ImpossibleLogpError",
    "KlEstimate",
    "LoraSettings",
    "MemoryShortageError",
    "MergeError",
    "MergeResult",
    "Method",
    "ModelFolderError",
    "NonFiniteError",
    "Option",
    "PairLogps",
    "PrecomputeConfig",
    "PrecomputeResult",
    "QuantizationError",
    "ResumeError",
    "RunExistsError",
    "RunInterruptedError",
    "RunState",
    "SFTConfig",
    "Sample",
    "SaveError",
    "ShareError",
    "StaleCacheError",
    "SweepConfig",
    "SweepResult",
    "SweepRow",
    "TrainConfig",
    "TrainResult",
    "UnsupportedModelError",
    "UntrustedReferenceError",
    "VocabularyError",
    "completion_logps",
    "dpo_loss",
    "evaluate",
    "ipo_loss",
    "load_model",
    "merge_adapter",
    "plan_cluster",
    "precompute",
    "read_lora_config",
    "sft_loss",
    "simpo_loss",
    "sweep",
    "train",
    "train_stages",
]
