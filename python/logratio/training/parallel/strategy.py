"""How a policy's passes run: in one process, replicated (DDP), or sharded (FSDP2).

Each process computes the gradient of its own micro-batches. The loss of each is divided by the
number of groups of the whole update, so an update's gradient is the sum over all processes, and
depends neither on their number nor on how groups are divided among them.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from logratio.logps.completion import inside, transformer


class Whole:
    """The whole model in one process.

    Attributes:
        parameters: The trained parameters.
        shards: Number of processes among which weights and optimizer state are divided.
        gradient_shards: The same for gradients, before their sum.
    """

    shards = gradient_shards = 1

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.parameters = [p for p in policy.parameters() if p.requires_grad]

    def run(self, job: Callable[..., Tensor], *given: Any) -> Tensor:
        """Return `job(policy, *given)`, a loss whose gradient is that of a micro-batch."""
        return job(self.policy, *given)

    def passes(self, own: int, _most: int) -> int:
        """Return how many micro-batches to compute in an update, with or without groups.

        Args:
            own: Number of micro-batches of this process.
            most: The largest number of any process.
        """
        return own

    def adding(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a forward and backward pass; gradients meet after the last one."""
        return nullcontext()

    def settle(self) -> None:
        """Drop weights that passes without gradients have gathered, before they are outdated."""


class Replicated(Whole):
    """The whole model in every process (DistributedDataParallel).

    Args:
        policy: The policy, equal in all processes.
        some_unused: Whether a trained weight may get no gradient in an update.
    """

    def __init__(self, policy: nn.Module, *, some_unused: bool) -> None:
        super().__init__(policy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the buffers' new name is not in 2.11
            self._engine = DistributedDataParallel(
                _Passes(policy),
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=some_unused,
            )
        # Its own hook averages, with a factor rounded to float32.
        self._engine.register_comm_hook(None, _sum_gradients)

    def run(self, job: Callable[..., Tensor], *given: Any) -> Tensor:
        """Return `job(policy, *given)`, computed where the engine sees it."""
        loss: Tensor = self._engine(job, *given)
        return loss

    def passes(self, own: int, _most: int) -> int:
        """Return `own`, or 1 without groups: the engine waits for every process."""
        return max(own, 1)

    def adding(self, *, last: bool) -> AbstractContextManager[Any]:
        """Sum the gradients over all processes during the last backward pass."""
        held: AbstractContextManager[Any] = nullcontext() if last else self._engine.no_sync()
        return held


def _sum_gradients(_state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over all processes, while the backward pass goes on."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


class _Passes(nn.Module):
    """The only door to a model under DDP, which acts on calls of a module's forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, job: Callable[..., Tensor], *given: Any) -> Tensor:
        return job(self.model, *given)


class Sharded(Whole):
    """A shard of every weight in each process (FSDP2): see `sharding.shard`.

    Every pass gathers weights from all processes, so all compute the same number of micro-batches.

    Args:
        policy: The sharded policy.
        whole_gradients: Keep whole gradients until the last micro-batch of an update, which saves
            communication. False: keep only this process's shard, which saves memory.
    """

    def __init__(self, policy: nn.Module, *, whole_gradients: bool) -> None:
        super().__init__(policy)
        self._root: Any = transformer(policy)
        weight: Any = self.parameters[0]
        self.shards = weight.device_mesh["shard"].size()
        self.gradient_shards = 1 if whole_gradients else self.shards
        self._whole_gradients = whole_gradients

    def run(self, job: Callable[..., Tensor], *given: Any) -> Tensor:
        """Return `job(policy, *given)`, computed where the root's weights are gathered."""
        return inside(self.policy, job, *given)

    def passes(self, _own: int, most: int) -> int:
        """Return `most`."""
        return most

    def adding(self, *, last: bool) -> AbstractContextManager[Any]:
        """Sum the gradients over all processes, if this is the time."""
        self._root.set_requires_gradient_sync(last or not self._whole_gradients)
        self._root.set_requires_all_reduce(last)  # between hosts, with hybrid shards
        return nullcontext()

    def settle(self) -> None:
        """Keep only this process's shard of every weight."""
        keep_own_shards(self._root)


def keep_own_shards(model: nn.Module) -> None:
    """Drop the weights that a sharded model has gathered; another model stays as it is."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
