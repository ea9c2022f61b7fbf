"""Where the models of a run are: whole in each process, or sharded over them."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from logratio.errors import ConfigError
from logratio.forecast import count
from logratio.logps.completion import batch_of
from logratio.logps.scores import differentiable_values
from logratio.progress import say
from logratio.training import memory
from logratio.training.accelerators import known_gpu
from logratio.training.config import TrainConfig
from logratio.training.model_shape import frozen_shape, policy_shape
from logratio.training.models import precision_of
from logratio.training.parallel.division import (
    SHARDED,
    Division,
    keeps_whole_gradients,
    replica_bytes,
)
from logratio.training.parallel.processes import Processes
from logratio.training.parallel.sharding import load_sharded, mesh_of, shard
from logratio.training.parallel.strategy import Replicated, Sharded, Whole
from logratio.training.reference import same_random_state
from logratio.training.validation import reference_kind


class Placement:
    """Loads the models of a run, whole or sharded.

    Args:
        config: Settings of the run.
        processes: The processes of the run, with their group if there are several.
        device: Device of this process.

    Attributes:
        mode: How models are divided: see `division.Mode`.

    Raises:
        ConfigError: The settings do not allow it.
    """

    def __init__(self, config: TrainConfig, processes: Processes, device: torch.device) -> None:
        self.config, self.processes, self.device = config, processes, device
        # Free memory differs between processes, and all must divide alike.
        needed, free = processes.from_first(lambda: [self._needed(), self._free])
        division = Division(config, needed, free, processes.count, processes.hosts)
        self.mode = division.mode
        if processes.count > 1 and processes.is_first:
            hosts = count(processes.hosts, "host")
            size = processes.per_prompt
            split = f", {size:,} compute each prompt together" if size > 1 else ""
            say(f"{processes.count:,} processes on {hosts}: {self.mode}{split}")
            if division.why:
                say(division.why)

    @property
    def is_sharded(self) -> bool:
        """Whether models are sharded."""
        return self.mode in SHARDED

    def _needed(self) -> float:
        """Return the bytes of a replica; 0 if they decide nothing."""
        decides = self.processes.count > 1 and self.config.parallel == "auto"
        return _replica_bytes(self.config, self.device) if decides else 0.0

    @property
    def _free(self) -> float:
        """Bytes that this process may use on its device.

        Of a known GPU, only the memory in its data sheet counts, as in a forecast for a cluster.
        """
        free = memory.free_on(self.device)
        if self.device.type != "cuda":
            return free / self.processes.per_host
        known = known_gpu(torch.cuda.get_device_name(self.device))
        _, total = torch.cuda.mem_get_info(self.device)
        return free - max(0.0, total - known.memory) if known else free

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
            trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
            large = not keeps_whole_gradients(trained, self._free)
            return Sharded(policy, whole_gradients=self.processes.highest(large) == 0)
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
    batch = batch_of([([0], [[0, 1]])], "padded", device)
    with same_random_state(policy), torch.enable_grad():
        differentiable_values(policy, batch).sum().backward()
    unused = any(parameter.grad is None for _, parameter in trained)
    for _, parameter in trained:
        parameter.grad = None
    return unused


def _replica_bytes(config: TrainConfig, device: torch.device) -> float:
    """Return `division.replica_bytes`; an estimate for models whose config does not give it."""
    frozen = config.reference or config.model if reference_kind(config) == "frozen" else None
    try:
        policy = policy_shape(config)
        second = frozen_shape(frozen, precision_of(config), config.quantization) if frozen else None
    except ConfigError:
        return memory.training_bytes(config, frozen)
    return replica_bytes(config, policy, second, device)
