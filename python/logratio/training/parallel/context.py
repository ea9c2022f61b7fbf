"""Let several processes compute each prompt of a run together: see `logps.context_parallel`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from logratio.errors import ConfigError
from logratio.logps.checks import split_refusal
from logratio.logps.completion import transformer
from logratio.logps.context_parallel import ContextRanks, split_over
from logratio.training.parallel.processes import Processes
from logratio.training.reference import FrozenReference, side_effect_free
from logratio.training.update import Updater


@contextmanager
def split_prompts(updater: Updater) -> Iterator[None]:
    """Split the shared batches of a run's models over `context_parallel_size` processes.

    Raises:
        ConfigError: A model's prompts cannot be split; the message has the reason.
    """
    processes, reference = updater.processes, updater.reference
    if processes.per_prompt == 1:
        yield
        return
    if updater.router:
        _refuse("the loss of routers counts the tokens of whole sequences: set "
                "--router-aux-loss-coef 0")  # fmt: skip
    if updater.layout != "shared":
        _refuse(f"it needs a model that can share prompts, and this one has the layout "
                f"{updater.layout}")  # fmt: skip
    models = [updater.policy]
    if isinstance(reference, FrozenReference):
        models.append(reference.model)
    ranks = context_ranks(processes)
    for model in models:
        with updater.autocast(), side_effect_free(model):
            if reason := split_refusal(model, ranks):
                _refuse(reason)
    with split_over(ranks, *map(transformer, models)):
        yield


def _refuse(reason: str) -> None:
    raise ConfigError(f"--context-parallel-size is not possible: {reason}")


def context_ranks(processes: Processes) -> ContextRanks:
    """Create the groups of processes that compute prompts together; return this process's own."""
    size = processes.per_prompt
    blocks = [list(range(start, start + size)) for start in range(0, processes.count, size)]
    groups = [dist.new_group(block) for block in blocks]  # all processes create all groups
    return ContextRanks(processes.rank % size, size, groups[processes.data_rank])
