"""The table of python/docs/planning.md, computed: three models on H100s and H200s."""

from collections.abc import Mapping
from pathlib import Path

from recipe_models import ARCHITECTURES
from stores import store_of

from logratio._rust import Store
from logratio.forecast import size
from logratio.training import Cluster, ClusterForecast, TrainConfig
from logratio.training.cluster_plan import plan_with

MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}
GPUS = (8, 64, 512)
PAIRS = 6
"""Pairs per GPU in an update: as many as a token budget of 8,192 takes."""


def folders(root: Path) -> Mapping[str, Path]:
    """Write a config.json per model."""
    for name in MODELS.values():
        ARCHITECTURES[name].save_pretrained(root / name)
    return {label: root / name for label, name in MODELS.items()}


def settings(model: Path, gpus: int) -> TrainConfig:
    """The settings that the page states."""
    return TrainConfig(
        model,
        "pairs.jsonl",
        "policy",
        cache="cache",
        precision="bf16-weights",
        token_budget=8192,
        batch_size=PAIRS * gpus,
    )


def pairs(gpus: int) -> Store:
    """Pairs of 500 tokens of prompt, 300 and 400 of completions: one update."""
    return store_of(*[(500, [300, 400])] * (PAIRS * gpus))


def forecast(model: Path, gpus: int, gpu: str) -> ClusterForecast:
    """Return the forecast for a row."""
    return plan_with(settings(model, gpus), Cluster(world_size=gpus, gpu=gpu), pairs(gpus))


def row(label: str, found: ClusterForecast) -> str:
    """Return a row of the table."""
    memory = f"{size(found.memory.bytes)} of {size(found.capacity)}"
    if not found.fits:
        cells = [f"{memory}: does not fit", "", "", "", ""]
    else:
        time = found.time
        cells = [
            memory,
            f"{found.layers_twice}",
            f"{time.seconds:.2f} s ({time.exposed:.2f})",
            f"{found.mfu:.0%}",
            f"{found.pairs_per_gpu_hour:,.0f}",
        ]
    head = [label, f"{found.world_size} {found.gpu}", found.mode]
    return " ".join(" | ".join(["", *head, *cells, ""]).split())


def rows(root: Path) -> list[str]:
    """Return all rows of the table."""
    models = folders(root)
    return [
        row(label, forecast(model, gpus, gpu))
        for label, model in models.items()
        for gpus in GPUS
        for gpu in ("h100", "h200")
    ]
