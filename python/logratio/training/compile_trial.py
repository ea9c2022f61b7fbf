"""Whether a run's layers are faster compiled: timed on its first micro-batches before it starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch
from torch import nn

from logratio.progress import say
from logratio.training.activations import Kept, decoder_layers, keeping
from logratio.training.reference import undisturbed

BATCHES = 4
"""Micro-batches of a round: those that the run begins with."""
ROUNDS = 3
"""Of which the median counts; plain and compiled take turns, so that both see the same machine."""
GAIN = 0.03
"""Share of the time that compiled layers must save, above what two equal runs differ by."""
SHORT = 180.0
"""Seconds of a run that are too few for a minute of compiling to come back."""


@dataclass(frozen=True)
class Verdict:
    """Whether layers are compiled, and a sentence about why."""

    compiled: bool
    reason: str


def try_compiling(
    policy: nn.Module, kept: Kept, rehearse: Callable[[], None], rounds_of_run: float
) -> Verdict:
    """Decide for a run with `compile_layers="auto"`.

    Args:
        policy: the model, its attention ready for the run's layout; it comes back as it was.
        kept: what its layers keep.
        rehearse: does some of the run's first micro-batches forward and backward.
        rounds_of_run: how many times `rehearse` has as many groups as the run.
    """
    if not decoder_layers(policy):
        return Verdict(False, "layers are not compiled: they are not transformers' own kind")

    def seconds_of(compiled: bool) -> float:
        return _seconds(policy, replace(kept, compiled=compiled), rehearse)

    with undisturbed(policy):
        return compare(seconds_of, rounds_of_run)


def compare(seconds_of: Callable[[bool], float], rounds_of_run: float) -> Verdict:
    """Choose between plain and compiled layers.

    Args:
        seconds_of: does a round with layers compiled (True) or not, and returns its seconds.
        rounds_of_run: rounds that have as many groups as the run.
    """
    seconds_of(False)  # what is made once
    run = seconds_of(False) * rounds_of_run
    if run < SHORT:
        return Verdict(False, f"layers are not compiled for a run of about {run:.0f} s")
    say("--compile auto: compiling the layers to time them, up to a minute")
    try:
        seconds_of(True)
    except Exception as error:  # compilers have errors of many types
        reason = (str(error).splitlines() or [""])[0]
        return Verdict(
            False, f"layers are not compiled, it fails: {type(error).__name__}: {reason[:200]}"
        )
    rounds = [(seconds_of(False), seconds_of(True)) for _ in range(ROUNDS)]
    plain, compiled = (median(times) for times in zip(*rounds, strict=True))
    is_faster = compiled < (1 - GAIN) * plain
    what = "layers are compiled" if is_faster else "layers are not compiled"
    return Verdict(is_faster, f"{what}: {compiled:.3f} s, and {plain:.3f} s as they are")


def _seconds(policy: nn.Module, kept: Kept, rehearse: Callable[[], None]) -> float:
    """Rehearse forward and backward, and let the gradients go."""
    device = next(policy.parameters()).device
    try:
        with keeping(policy, kept):
            start = perf_counter()
            rehearse()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return perf_counter() - start
    finally:
        policy.zero_grad(set_to_none=True)
