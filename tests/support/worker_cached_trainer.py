"""One of the processes that `tests/python/integrations/test_trl.py` starts with torchrun."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl_trainers import cached, load, losses


def main(model: Path, pairs: Path, folder: Path) -> None:
    """Train on the pairs and write this rank's losses and reference columns."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    parts = {
        "model": load(model),
        "processing_class": AutoTokenizer.from_pretrained(model),
        "train_dataset": Dataset.from_list(rows),
    }
    trainer = cached(folder, model, parts, per_device_train_batch_size=2)
    report = {
        "columns": trainer.train_dataset["ref_chosen_logps"][:],
        "losses": losses(trainer),
        "processes": trainer.accelerator.num_processes,
    }
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
