"""Arms whose settings are tuned before the comparison, for both sides."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from step_arms import ARMS, Arm
from step_record import Spec
from step_rounds import Pythons, WorkerError, run_arm
from step_summary import steady_seconds

BUDGETS = {"cpu": (2**10, 2**11, 2**12), "cuda": (2**13, 2**14, 2**16)}
"""Tokens of our micro-batches. Each is tried with compiled layers too."""


def rival_candidates(spec: Spec) -> dict[str, Arm]:
    """Return TRL with the update whole, in halves, quarters and eighths."""
    sizes = [spec.batch // parts for parts in (1, 2, 4, 8) if spec.batch % parts == 0]
    return {str(size): _with("trl-tuned", micro_batch=size) for size in sizes}


def own_candidates(spec: Spec) -> dict[str, Arm]:
    """Return ours by budget, and with its layers compiled or not."""
    budgets = BUDGETS["cuda" if spec.device.startswith("cuda") else "cpu"]
    return {
        f"{budget}{', compiled' * compiled}": _with(
            "ours-fastest",
            config=ARMS["ours-fastest"].settings["config"]
            | {"token_budget": budget, "compile_layers": compiled},
        )
        for budget in budgets
        for compiled in (False, True)
    }


CANDIDATES = {"trl-tuned": rival_candidates, "ours-fastest": own_candidates}


def _with(name: str, **settings: Any) -> Arm:
    arm = ARMS[name]
    return replace(arm, settings={**arm.settings, **settings})


def tuned(name: str, spec: Spec, pythons: Pythons) -> tuple[Arm, dict[str, float | str]]:
    """Choose the fastest of an arm's candidates.

    Returns:
        It, and the seconds of each that was tried, or why it failed.
    """
    candidates = CANDIDATES[name](spec)
    tried = {label: _seconds(name, arm, spec, pythons) for label, arm in candidates.items()}
    print(f"{name}, seconds by setting: {tried}", flush=True)
    return candidates[fastest(tried)], tried


def fastest(tried: Mapping[str, float | str]) -> str:
    """Return the setting that took least; the first where none ended."""
    seconds = {label: found for label, found in tried.items() if isinstance(found, float)}
    return min(seconds, key=seconds.__getitem__) if seconds else next(iter(tried))


def _seconds(name: str, arm: Arm, spec: Spec, pythons: Pythons) -> float | str:
    try:
        return steady_seconds(run_arm(name, arm, spec, pythons), spec.warmup)
    except WorkerError as error:
        return str(error)
