"""Decide whether to compile a run's layers by timing its first micro-batches both ways."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter

import torch
from torch import nn

from logratio.progress import say
from logratio.training.activations import LayerOptions, decoder_layers, layer_options
from logratio.training.reference import side_effect_free

BATCHES = 4
"""Micro-batches per timing round: the first ones of the run."""
ROUNDS = 3
"""Rounds per variant, of which the median counts. Plain and compiled rounds alternate, so that
changes in the machine's load affect both."""
GAIN = 0.03
"""Share of the time that compiled layers must save; equal runs differ by less."""
SHORT = 180.0
"""A shorter run, in seconds, would not recover the minute that compiling takes."""


@dataclass(frozen=True)
class Verdict:
    """Whether to compile the layers, and why."""

    compiled: bool
    reason: str


def try_compiling(
    policy: nn.Module, kept: LayerOptions, rehearse: Callable[[], None], rounds_of_run: float
) -> Verdict:
    """Decide whether a run with `compile_layers="auto"` compiles its layers.

    Args:
        policy: The model, with its attention ready for the run's layout. It is not changed.
        kept: Checkpointing and offloading of the run.
        rehearse: Runs some of the first micro-batches forward and backward.
        rounds_of_run: Number of groups in the run, divided by those of one `rehearse` call.
    """
    if not decoder_layers(policy):
        return Verdict(False, "layers are not compiled: they are not transformers layers")

    def seconds_of(compiled: bool) -> float:
        return _seconds(policy, replace(kept, compiled=compiled), rehearse)

    with side_effect_free(policy):
        return compare(seconds_of, rounds_of_run)


def compare(seconds_of: Callable[[bool], float], rounds_of_run: float) -> Verdict:
    """Choose between plain and compiled layers.

    Args:
        seconds_of: Runs a round with layers compiled (True) or not; returns its seconds.
        rounds_of_run: Number of rounds that correspond to the whole run.
    """
    seconds_of(False)  # warm-up
    run = seconds_of(False) * rounds_of_run
    if run < SHORT:
        return Verdict(False, f"layers are not compiled for a run of about {run:.0f} s")
    say("--compile auto: compiling the layers to time them, up to a minute")
    try:
        seconds_of(True)
    except Exception as error:  # compilers have errors of many types
        reason = (str(error).splitlines() or [""])[0]
        return Verdict(False, f"layers are not compiled: {type(error).__name__}: {reason[:200]}")
    rounds = [(seconds_of(False), seconds_of(True)) for _ in range(ROUNDS)]
    plain, compiled = (median(times) for times in zip(*rounds, strict=True))
    is_faster = compiled < (1 - GAIN) * plain
    what = "layers are compiled" if is_faster else "layers are not compiled"
    return Verdict(is_faster, f"{what}: {compiled:.3f} s compiled, {plain:.3f} s plain")


def _seconds(policy: nn.Module, kept: LayerOptions, rehearse: Callable[[], None]) -> float:
    """Time `rehearse`, and discard its gradients."""
    device = next(policy.parameters()).device
    try:
        with layer_options(policy, kept):
            start = perf_counter()
            rehearse()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return perf_counter() - start
    finally:
        policy.zero_grad(set_to_none=True)
