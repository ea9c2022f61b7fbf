"""Where the models of a run are: whole in each process, or sharded over them."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from logratio.errors import ConfigError
from logratio.forecast import size
from logratio.logps.completion import batch_of, completion_logps
from logratio.progress import say
from logratio.training import memory
from logratio.training.config import TrainConfig
from logratio.training.given_model import given_model
from logratio.training.models import base_folder, is_quantized, precision_of
from logratio.training.parallel.processes import Processes
from logratio.training.parallel.sharding import load_sharded, mesh_of, shard
from logratio.training.parallel.strategy import Replicated, Sharded, Whole
from logratio.training.reference import same_random_state
from logratio.training.validation import reference_kind

Mode = Literal["one", "ddp", "fsdp", "hsdp"]
SHARDED = ("fsdp", "hsdp")
SHARE = 0.7
"""Share of a device's memory that weights, gradients and optimizer state of a replicated model may
take; activations and the head's tiles need the rest."""
SMALL_SHARE = 0.1
"""Share of a device's memory up to which whole gradients are kept for a sharded model."""


class Placement:
    """Loads the models of a run, whole or sharded.

    Args:
        config: Settings of the run.
        processes: The processes of the run, with their group if there are several.
        device: Device of this process.

    Attributes:
        mode: "one", the whole model in one process; "ddp", replicated; "fsdp", sharded over all
            processes; or "hsdp", sharded within each host and replicated across hosts.
    """

    def __init__(self, config: TrainConfig, processes: Processes, device: torch.device) -> None:
        self.config, self.processes, self.device = config, processes, device
        self.mode: Mode = processes.from_first(lambda: _mode(config, processes, device))
        if self.mode == "ddp":
            _check_replicated(config)
        if self.is_sharded:
            check_sharded(config)

    @property
    def is_sharded(self) -> bool:
        """Whether models are sharded."""
        return self.mode in SHARDED

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The mesh of the shards."""
        return mesh_of(self.processes, self.device, hybrid=self.mode == "hsdp")

    def load(self, build: Callable[[str], nn.Module]) -> nn.Module:
        """Return the model that `build` builds on a device, sharded if models are.

        Args:
            build: Builds the model on the device of its name, or without weights on "meta".
        """
        if not self.is_sharded:
            return build(str(self.device))
        if self.config.quantization:  # a quantized weight is made on its device, with its scales
            model = build(str(self.device))
            shard(model, self.mesh, autocast=False)
            return model
        autocast = precision_of(self.config) == "bf16"
        first = self.processes.is_first
        return load_sharded(build, self.mesh, self.device, first=first, autocast=autocast)

    def strategy(self, policy: nn.Module) -> Whole:
        """Return how passes of the policy run."""
        if self.is_sharded:
            trained = sum(4 * p.numel() for p in policy.parameters() if p.requires_grad)
            fits = trained <= SMALL_SHARE * memory.free_on(self.device)
            return Sharded(policy, whole_gradients=bool(self.processes.highest(not fits) == 0))
        if self.mode == "ddp":
            return Replicated(policy, some_unused=_some_unused(policy, self.device))
        return Whole(policy)


def _some_unused(policy: nn.Module, device: torch.device) -> bool:
    """Return whether a trained weight may get no gradient in an update, for which DDP would wait.

    Experts without a token are such weights, and those that a family's code never uses.
    """
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    if any("expert" in name for name, _ in trained):
        return True
    with same_random_state(policy), torch.enable_grad():
        completion_logps(policy, batch_of([([0], [[0, 1]])], "padded", device)).sum().backward()
    unused = any(parameter.grad is None for _, parameter in trained)
    for _, parameter in trained:
        parameter.grad = None
    return unused


def _mode(config: TrainConfig, processes: Processes, device: torch.device) -> Mode:
    if processes.count == 1:
        return "fsdp" if config.parallel in SHARDED else "one"
    if config.parallel != "auto":
        return config.parallel
    frozen = config.reference or config.model if reference_kind(config) == "frozen" else None
    needed = memory.training_bytes(config, frozen)
    room = SHARE * memory.free_on(device) / (processes.per_host if device.type == "cpu" else 1)
    if needed <= room or config.quantization == "8bit" or given_model(config.model):
        return "fsdp" if _sums_in_bfloat16(config) else "ddp"
    mode: Mode = "hsdp" if needed / processes.per_host <= room and processes.hosts > 1 else "fsdp"
    say(
        f"--parallel auto: {mode}, because a replica would take {size(needed)} of each device for "
        f"weights, gradients and optimizer state, and {size(room)} are free for them"
    )
    return mode


def _check_replicated(config: TrainConfig) -> None:
    """Refuse what DDP would compute in too few bits.

    Raises:
        ConfigError: Trained weights are in bfloat16: DDP would sum their gradients in bfloat16.
    """
    if _sums_in_bfloat16(config):
        raise ConfigError(
            "parallel ddp would sum the gradients of bf16-weights in bfloat16: use parallel fsdp, "
            "which sums in float32, or precision bf16"
        )


def _sums_in_bfloat16(config: TrainConfig) -> bool:
    return precision_of(config) == "bf16-weights" and not config.trains_adapter


def check_sharded(config: TrainConfig) -> None:
    """Refuse what FSDP2 cannot shard.

    Raises:
        ConfigError: The message names the setting and the reason.
    """
    reason = ""
    if config.quantization == "8bit":
        reason = (
            "bitsandbytes keeps the scales of 8-bit weights in attributes of the weight, which "
            "FSDP2 loses: use quantization 4bit, or parallel ddp"
        )
    elif is_quantized(base_folder(Path(config.model))):
        reason = "the model's folder has quantized weights, which are not sharded: use parallel ddp"
    elif config.optimizer == "adamw8bit":
        reason = (
            "the optimizer adamw8bit of bitsandbytes cannot read shards: use adamw, whose state is "
            "sharded too"
        )
    elif config.optimizer == "adamw-host":
        reason = "the optimizer adamw-host keeps whole weights on the host: use adamw"
    elif given_model(config.model):
        reason = "a model in memory is whole in every process already: give its folder, or ddp"
    if reason:
        raise ConfigError(f"parallel {config.parallel} is not possible: {reason}")
