"""What the ranks of a test do: see `forked_ranks`."""

import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from logratio import Callback, DPOTrainer, LoraSettings
from logratio.logps import checks
from logratio.logps.completion import transformer
from logratio.training import models, trainer, update
from logratio.training.optimizers import AdamSettings
from logratio.training.parallel import division, lifeline


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
    """Train with settings of which each rank has some of its own."""
    train(dict(settings) | dict(own[int(os.environ["RANK"])]))


def train_with_small_files(settings: Mapping[str, Any], rank: int, most: int) -> None:
    """Train; the files that one rank writes cannot grow beyond `most` bytes, as on a full disk."""
    if int(os.environ["RANK"]) == rank:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    train(settings)


def train_impatiently(settings: Mapping[str, Any]) -> None:
    """Train; a silent rank counts as dead after two seconds."""
    lifeline.STALE, lifeline.GRACE = 2.0, 1.0
    train(settings)
