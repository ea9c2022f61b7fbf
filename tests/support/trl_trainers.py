"""TRL's trainers with a cached reference, for tests and their worker."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from logratio.integrations.trl import CachedDPOTrainer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    path = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 16)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def parts(tiny_model: Path, pairs: list[dict[str, str]]) -> Callable[..., dict[str, Any]]:
    """Make what both trainers take: the same model from the same weights, the same pairs."""

    def make(**more: Any) -> dict[str, Any]:
        return {
            "model": load(tiny_model),
            "processing_class": AutoTokenizer.from_pretrained(tiny_model),
            "train_dataset": Dataset.from_list(pairs),
            **more,
        }

    return make


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def settings(folder: Path, **more: Any) -> DPOConfig:
    """Settings under which two runs of a tiny model can be compared to the last digit."""
    usual: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    return DPOConfig(**(usual | more))


def cached(folder: Path, reference: Path, parts: dict[str, Any], **more: Any) -> Any:
    """Make our trainer with the cache of this test's folder."""
    args = settings(folder, precompute_ref_log_probs=True, **more)
    return CachedDPOTrainer(
        cache=folder / "cache", reference=reference, fill=True, args=args, **parts
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
