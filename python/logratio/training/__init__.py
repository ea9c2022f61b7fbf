"""Preference optimisation in plain torch: log-probs, losses, the reference, the loop.

`train(TrainConfig(...))` does what `logratio train` does; the parts can be used alone.
"""

from logratio.logps.completion import completion_logps as completion_logps
from logratio.training.config import EvaluateConfig as EvaluateConfig
from logratio.training.config import LoraSettings as LoraSettings
from logratio.training.config import PrecomputeConfig as PrecomputeConfig
from logratio.training.config import TrainConfig as TrainConfig
from logratio.training.evaluation import evaluate as evaluate
from logratio.training.losses import PairLogps as PairLogps
from logratio.training.losses import dpo_loss as dpo_loss
from logratio.training.losses import ipo_loss as ipo_loss
from logratio.training.losses import sft_loss as sft_loss
from logratio.training.losses import simpo_loss as simpo_loss
from logratio.training.models import load_model as load_model
from logratio.training.precomputation import precompute as precompute
from logratio.training.trainer import train as train
