"""A hundred updates give the losses that they gave when this file was written.

A change of a default, of the data's order or of the arithmetic shows here. If it is meant, run this
file with tests and tests/support in PYTHONPATH: it prints the new losses.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import write_pairs
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from logratio.training import TrainConfig, train

GOLDEN = Path(__file__).with_name("golden_losses.json")
TOLERANCE = 2e-5
"""Weights that differ by a relative 1e-6 at the start change these losses by less than a tenth."""


def losses(folder: Path, nudge: float = 0.0) -> list[float]:
    """Train a tiny model for 100 updates; its weights come from a formula, not from a generator."""
    model_folder = save_tiny_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        for number, (name, weight) in enumerate(model.named_parameters(), 1):
            if "norm" in name:
                continue
            places = torch.arange(1, weight.numel() + 1, dtype=torch.float64)
            values = 0.3 * torch.sin(places * places * 0.7 + number)
            values *= 1 + nudge * torch.cos(places)
            weight.copy_(values.view(weight.shape))
    model.save_pretrained(model_folder)
    config = TrainConfig(
        model_folder,
        write_pairs(folder / "pairs.jsonl", 30),
        folder / "out",
        lr=2e-4,
        weight_decay=0.01,
        batch_size=4,
        max_steps=100,
        save_every=0,
        seed=5,
        report_to="none",
        device="cpu",
    )
    return [row["loss"] for row in train(config, show_progress=False).history]


def test_the_losses_of_a_hundred_updates_are_those_on_record(tmp_path: Path) -> None:
    recorded = json.loads(GOLDEN.read_text())
    assert len(recorded) == 100
    assert recorded[-1] < 0.5 * recorded[0], "the run learns"
    assert losses(tmp_path) == pytest.approx(recorded, abs=TOLERANCE)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        json.dump([round(loss, 7) for loss in losses(Path(folder))], sys.stdout)
