"""Whether a run's layers are faster compiled: timed on its first micro-batches before it starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from logratio.progress import say
from logratio.training import checkpoint
from logratio.training.activations import Kept, decoder_layers, keeping
from logratio.training.loop import Loop
from logratio.training.reference import undisturbed
from logratio.training.run_folder import CHECKPOINTS

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


def settle_compiling(loop: Loop, kept: Kept, updates: int) -> Kept:
    """Decide for a run with `compile_layers="auto"`, and say what was decided.

    A run that goes on from a checkpoint keeps what it began with: results differ by rounding.

    Args:
        loop: of the run, the policy's attention ready for its layout. Nothing of it changes.
        kept: what its layers keep.
        updates: of the whole run.
    """
    before = None
    if loop.config.resume:
        before = checkpoint.recorded(Path(loop.config.output) / CHECKPOINTS, "compiled")
    if before is None:
        verdict = _measured(loop, kept, updates)
        say(f"--compile auto: {verdict.reason}")
        before = verdict.compiled
    loop.identity["compiled"] = before
    return replace(kept, compiled=before)


def _measured(loop: Loop, kept: Kept, updates: int) -> Verdict:
    if not decoder_layers(loop.policy):
        return Verdict(False, "layers are not compiled: they are not transformers' own kind")
    batches = loop.first_batches(BATCHES)
    share = sum(map(len, batches)) / (updates * loop.config.batch_size)

    def seconds_of(compiled: bool) -> float:
        return _seconds(loop, batches, replace(kept, compiled=compiled))

    with undisturbed(loop.policy):
        return compare(seconds_of, rounds_of_run=1 / share)


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


def _seconds(loop: Loop, batches: Sequence[np.ndarray], kept: Kept) -> float:
    """Do the batches forward and backward, and let their gradients go."""
    try:
        with keeping(loop.policy, kept):
            start = perf_counter()
            for groups in batches:
                loop.rehearse(groups)
            if loop.device.type == "cuda":
                torch.cuda.synchronize(loop.device)
            return perf_counter() - start
    finally:
        loop.policy.zero_grad(set_to_none=True)
