"""How a model is divided over processes: what is possible, and what "auto" chooses.

The trainer and the forecast of a cluster both ask here, so a run does what its forecast expects.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from logratio.errors import ConfigError
from logratio.forecast import size
from logratio.training.config import TrainConfig
from logratio.training.given_model import is_in_memory
from logratio.training.methods.objective import Objective
from logratio.training.model_shape import ModelShape
from logratio.training.models import base_folder, is_quantized, precision_of, weights_dtype
from logratio.training.optimizers import gradient_bytes, state_bytes

Mode = Literal["one", "ddp", "fsdp", "hsdp"]
"""The whole model in one process; replicated; sharded over all processes; or sharded within each
host and replicated across hosts."""
SHARDED: tuple[Mode, ...] = ("fsdp", "hsdp")
SHARE = 0.7
"""Share of a device's memory that weights, gradients and optimizer state of a replicated model may
take; activations and the head's tiles need the rest."""
SMALL_SHARE = 0.1
"""Share of the memory that a loaded model leaves free up to which whole gradients are kept."""
_ROUNDS = "DDP would sum the gradients of bf16-weights in bfloat16"


@dataclass(frozen=True)
class Division:
    """What decides how the model of a run is divided.

    Attributes:
        config: Settings of the run.
        needed: Bytes of a replica: see `replica_bytes`.
        free: Bytes that a process may use on its device, before a model is loaded.
        processes: Number of processes.
        hosts: Number of hosts.
    """

    config: TrainConfig
    needed: float
    free: float
    processes: int
    hosts: int

    @property
    def room(self) -> float:
        """Bytes that a replica may take."""
        return SHARE * self.free

    @cached_property
    def mode(self) -> Mode:
        """How the model is divided.

        Raises:
            ConfigError: The settings do not allow it; the message has the reason.
        """
        parallel = self.config.parallel
        found: Mode
        if self.processes == 1:
            found = "fsdp" if parallel in SHARDED else "one"
        else:
            found = self._automatic() if parallel == "auto" else parallel
        if reason := reason_against(self.config, found):
            raise ConfigError(f"parallel {parallel} is not possible: {reason}")
        return found

    def _automatic(self) -> Mode:
        """Return "ddp" if a replica has room, else shards, within hosts if those have room."""
        against, against_shards = (reason_against(self.config, mode) for mode in ("ddp", "fsdp"))
        if against and against_shards:
            raise ConfigError(f"parallel auto is not possible: {against}; and {against_shards}")
        if against_shards or not (against or self.needed > self.room):
            return "ddp"
        fits_host = self.needed / (self.processes // self.hosts) <= self.room
        return "hsdp" if self.hosts > 1 and fits_host else "fsdp"

    @property
    def why(self) -> str:
        """Why "auto" shards the model; empty if it does not, or if the setting is not "auto"."""
        if self.config.parallel != "auto" or self.mode not in SHARDED:
            return ""
        reason = _ROUNDS if reason_against(self.config, "ddp") else (
            f"a replica would take {size(self.needed)} of each device for weights, gradients and "
            f"optimizer state, and {size(self.room)} are free for them"
        )  # fmt: skip
        return f"--parallel auto: {self.mode}, because {reason}"


def replica_bytes(
    config: TrainConfig, policy: ModelShape, frozen: ModelShape | None, device: torch.device
) -> float:
    """Return the bytes of weights, gradients and optimizer state of a whole model.

    Args:
        config: Settings of the run.
        policy: The shape of the model.
        frozen: The shape of a second model that is the reference, whose weights count too.
        device: A device of the kind that trains.
    """
    dtype = torch.float32 if config.trains_adapter else weights_dtype(precision_of(config))
    own = gradient_bytes(dtype, added_up=True) + state_bytes(config.optimizer, dtype, device)
    return policy.stored + own * policy.trained + (frozen.stored if frozen else 0.0)


def reason_against(config: TrainConfig, mode: Mode) -> str:
    """Return why a model cannot be divided in a way, and the remedy; empty if it can.

    Args:
        config: Settings of the run.
        mode: The way.
    """
    if mode == "one":
        return ""
    if mode == "ddp":
        rounds = precision_of(config) == "bf16-weights" and not config.trains_adapter
        remedy = "use parallel fsdp, which sums in float32, or precision bf16"
        return f"{_ROUNDS}: {remedy}" if rounds else ""
    if Objective.of(config).needs_divergences:
        return (
            f"the loss {config.loss} compares whole distributions of two models, whose heads are "
            "gathered at different times: use parallel ddp"
        )
    if is_in_memory(config.model):
        return "a model in memory is whole in every process already: give its folder, or ddp"
    if config.quantization == "8bit":
        return (
            "bitsandbytes keeps the scales of 8-bit weights in attributes of the weight, which "
            "FSDP2 loses: use quantization 4bit, or parallel ddp"
        )
    if is_quantized(base_folder(Path(config.model))):
        return "the model's folder has quantized weights, which are not sharded: use parallel ddp"
    return _OPTIMIZERS.get(config.optimizer, "")


_OPTIMIZERS = {
    "adamw8bit": "the optimizer adamw8bit of bitsandbytes cannot read shards: use adamw, whose "
    "state is sharded too",
    "adamw-host": "the optimizer adamw-host keeps whole weights on the host: use adamw",
}


def keeps_whole_gradients(trained: int, free: float) -> bool:
    """Return whether the processes of a sharded model keep whole gradients during an update.

    They are then summed once, after the last micro-batch, and not after each.

    Args:
        trained: Number of trained weights of the whole model.
        free: Bytes that are free on a device after the models are loaded.
    """
    return 4 * trained <= SMALL_SHARE * free
