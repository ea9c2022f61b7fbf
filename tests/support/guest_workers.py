"""What ranks do in tests of processes that belong to another program: see `forked_ranks`."""

import os
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch.distributed as dist

from logratio import DPOTrainer, LogratioError
from logratio.training.parallel.processes import join_processes


def train_in_a_group_of_gpus(settings: Mapping[str, Any]) -> None:
    """Train in a group that exists already, and that seems to have no backend for the host."""
    dist.init_process_group("gloo")
    with mock.patch.object(dist, "get_backend_config", lambda: "cuda:nccl"):
        DPOTrainer(**settings).train()
    assert join_processes()._host_group is not None


def fail_and_go_on(settings: Mapping[str, Any]) -> None:
    """Fail in rank 1, catch every error, print it, and try to train again."""
    dist.init_process_group("gloo")
    given = dict(settings, seed=int(os.environ["RANK"]))
    for _ in range(2):
        try:
            DPOTrainer(**given).train()
        except LogratioError as error:
            print(error)
