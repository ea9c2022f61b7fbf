"""Numbers by which two runs are compared."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def gap(one: Path, other: Path, dtype: torch.dtype = torch.float64) -> float:
    """Return the largest difference of two runs' weights."""
    left, right = (load_file(next(path.glob("*model.safetensors"))) for path in (one, other))
    assert left.keys() == right.keys()
    assert all(value.dtype == dtype for value in left.values())
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def numbers(folder: Path) -> list[float]:
    """Return all numbers of a run's metrics and evaluations."""
    texts = [(folder / name).read_text() for name in ("metrics.jsonl", "evaluations.jsonl")]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    found = [value for row in rows for value in row.values() if isinstance(value, int | float)]
    assert len(found) > 20
    return found
