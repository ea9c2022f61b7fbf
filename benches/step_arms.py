"""The arms of bench_step.py: name, worker and settings.

A new rung of the ladder is one line: `config` takes any field of TrainConfig, `patches` any name of
`step_patches.PATCHES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A way to compute the same updates.

    Attributes:
        worker: The script, in this folder.
        settings: Settings for the worker.
        order: Order of the pairs, for this arm and for ours compared with it.
    """

    worker: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    order: str = "shuffled"


def _ours(**settings: Any) -> Arm:
    return Arm("step_ours.py", settings)


OURS: Mapping[str, Arm] = {
    "ours": _ours(),
    "ours-again": _ours(),
    "ours-fastest": _ours(config={"activation_checkpointing": "off"}),
    "ours-cold": _ours(precompute=True),
}

LADDER: Mapping[str, Arm] = {
    "own-prompts": _ours(patches=["own_prompts"]),
    "no-sharing": _ours(patches=["separate_rows"]),
    "frozen": _ours(cache=False),
    "no-head-fusion": _ours(patches=["logps_first"]),
    "whole-head": _ours(patches=["whole_head"]),
    "head-everywhere": _ours(patches=["head_everywhere"]),
    "checkpointing": _ours(config={"activation_checkpointing": "all"}),
    "small-batches": _ours(config={"token_budget": 1 << 10}),
    "large-batches": _ours(config={"token_budget": 1 << 13}),
    "compiled": _ours(config={"compile_layers": True}),
    "compiled-static": _ours(
        config={"compile_layers": True, "token_budget": 1 << 10}, patches=["one_width"]
    ),
    "all-undone": _ours(cache=False, patches=["separate_rows", "head_everywhere"]),
}
"""Ours with one optimisation removed each, or compiled layers added."""

RIVALS: Mapping[str, Arm] = {
    "plain": Arm("step_plain.py", {"reference": "frozen"}),
    "plain-cached": Arm("step_plain.py", {"reference": "given"}),
    "trl": Arm("rival_step.py"),
    "trl-tuned": Arm(
        "rival_step.py",
        {"config": {"gradient_checkpointing": False, "logging_steps": 1_000}},
        order="length_grouped",
    ),
}

ARMS: Mapping[str, Arm] = {**OURS, **LADDER, **RIVALS}
