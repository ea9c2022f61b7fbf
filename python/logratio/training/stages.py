"""Stage-wise training (sDPO): each stage starts from the stage before, which is its reference."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from logratio.data.readers.inputs import as_inputs
from logratio.errors import ConfigError
from logratio.progress import say
from logratio.training.config import TrainConfig
from logratio.training.run_folder import TrainResult
from logratio.training.trainer import train
from logratio.training.validation import needs_reference

STAGES = "stages"
"""Folder of the stages before the last, in the output folder."""


def stages_of(config: TrainConfig) -> list[TrainConfig]:
    """Return the settings of each stage: one for each input of `data`, in its order.

    The policy and the reference of a stage are the policy of the stage before (Kim et al. 2024,
    sDPO, arXiv 2403.19270). Adapters are trained further, and their copy at the start of a stage is
    its reference. The last stage writes to the output folder itself.

    Raises:
        ConfigError: There is only one input, or a setting does not fit stages.
    """
    inputs = as_inputs(config.data)
    if len(inputs) < 2:
        raise ConfigError("--stagewise trains one stage for each file of --data: give several")
    if not needs_reference(config):
        raise ConfigError(f"--loss {config.loss} has no reference; remove --stagewise")
    if config.mix:
        raise ConfigError("--mix draws from all inputs at once; remove it, or --stagewise")
    stages, before = list[TrainConfig](), None
    for number, data in enumerate(inputs, 1):
        is_last = number == len(inputs)
        output = Path(config.output) if is_last else Path(config.output) / STAGES / str(number)
        stage = replace(config, data=[data], output=output)
        stages.append(stage if before is None else replace(stage, **_continuing(config, before)))
        before = output
    return stages


def _continuing(config: TrainConfig, before: Path) -> dict[str, Any]:
    """Return what changes for a stage that starts from the output of another."""
    adapters = {"lora": None, "adapter": "continue"} if config.trains_adapter else {}
    return {"model": before, "reference": None, "revision": None, **adapters}


def train_stages(config: TrainConfig, *, show_progress: bool = True) -> TrainResult:
    """Train all stages; return the result of the last one.

    With `cache` and `precompute`, the reference of each stage is scored before the stage begins.
    With `resume`, finished stages are kept, and the first unfinished one continues.

    Raises:
        LogratioError: As raised by `train`.
    """
    stages = stages_of(config)
    for number, stage in enumerate(stages, 1):
        say(f"stage {number} of {len(stages)}: {', '.join(map(str, stage.data))} → {stage.output}")
        result = train(stage, show_progress=show_progress)
    return result
