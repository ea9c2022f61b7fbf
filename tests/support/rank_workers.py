"""What the ranks of a test do: see `forked_ranks`."""

import json
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logratio import Callback, DPOTrainer, LoraSettings
from logratio.data.tokenization import chat_template
from logratio.logps import checks
from logratio.logps.completion import transformer
from logratio.training import memory, models, trainer, update
from logratio.training.optimizers import AdamSettings
from logratio.training.parallel import division, lifeline
from logratio.training.parallel.processes import join_processes


def train_in_float64(settings: Mapping[str, Any], whole_gradients: bool = True) -> None:
    """Train with weights, gradients and optimizer state in float64."""
    models.weights_dtype = lambda _: torch.float64  # type: ignore[assignment]
    build: Any = vars(trainer)["build_policy"]

    def built(*given: Any) -> nn.Module:
        policy = build(*given).double()  # adapters too
        transformer(policy).set_experts_implementation("eager")  # grouped products have no float64
        return policy  # type: ignore[no-any-return]

    vars(trainer)["build_policy"] = built
    for limits in (checks.TOLERANCE, checks.SAME_CALLS):
        limits[torch.float64] = 1e-9
    vars(update)["make_optimizer"] = _plain_adamw
    division.SMALL_SHARE = 1.0 if whole_gradients else 0.0
    train(settings)


def _plain_adamw(
    _name: str, parameters: Sequence[nn.Parameter], settings: AdamSettings
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(settings.groups(parameters))


def train(settings: Mapping[str, Any], kill_after: int | None = None) -> None:
    """Train; optionally end with SIGTERM after an update."""
    given = dict(settings)
    if "lora" in given:
        given["lora"] = LoraSettings(**given["lora"])
    callbacks = [] if kill_after is None else [SignalAfter(kill_after)]
    DPOTrainer(**given, callbacks=callbacks).train()


class SignalAfter(Callback):
    """Sends SIGTERM to its process after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_update(self, state: Any, _metrics: Mapping[str, float]) -> None:
        """Send the signal if it is time."""
        if state.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train_differently(settings: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> None:
    """Train with settings that differ between ranks."""
    train(dict(settings) | dict(own[int(os.environ["RANK"])]))


def train_with_small_files(settings: Mapping[str, Any], rank: int, most: int) -> None:
    """Train; the files that one rank writes cannot grow beyond `most` bytes, as on a full disk."""
    if int(os.environ["RANK"]) == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    train(settings)


def train_impatiently(settings: Mapping[str, Any]) -> None:
    """Train; a silent rank counts as dead after four seconds."""
    lifeline.STALE, lifeline.GRACE = 4.0, 1.0
    train(settings)


def exchange(file: str) -> None:
    """Exchange values before and after the group exists; write what each process has seen."""
    processes = join_processes()
    early = processes.share({"rank": processes.rank})
    first = processes.from_first(lambda: ["first", processes.rank])
    leader = processes.from_leader(lambda: processes.rank)
    processes.wait()
    processes.start_group(torch.device("cpu"))
    late = processes.share("é" * (processes.rank + 1))
    total = processes.total(torch.tensor([1.0, float(processes.rank)])).tolist()
    seen = [early, first, leader, late, total, processes.highest(processes.rank)]
    Path(f"{file}.{processes.rank}").write_text(json.dumps(seen))


class HalfUsed(nn.Module):
    """A head with a weight that no pass uses."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(size))


def train_with_an_unused_weight(settings: Mapping[str, Any]) -> None:
    """Train a model with a weight that gets no gradient."""
    build: Any = vars(trainer)["build_policy"]

    def built(*given: Any) -> nn.Module:
        policy: nn.Module = build(*given)
        policy.register_module("spare", HalfUsed(3))
        return policy

    vars(trainer)["build_policy"] = built
    train(settings)


def train_with_little_memory(settings: Mapping[str, Any], rank: int) -> None:
    """Train; one rank has too little memory for all activations."""
    if int(os.environ["RANK"]) == rank:
        vars(memory)["free_on"] = lambda _: 1e6
    train(settings)


def train_on_days(settings: Mapping[str, Any], days: Sequence[str]) -> None:
    """Train; each rank's clock shows another day."""
    day = days[int(os.environ["RANK"])]
    vars(chat_template)["today"] = lambda: day
    train(settings)
