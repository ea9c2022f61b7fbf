"""Time of pairs with a shared prompt against separate rows, both without padding.

    python step_sharing.py MATERIAL MODEL DEVICE PRECISION THREADS ROUNDS

The same log-probs and their gradient, by the same engine: once as groups of two completions, once
as two groups of one. `time_ratio` should be near `token_ratio`, the tokens with and without
sharing; `work_ratio` counts operations, including head and attention, where sharing saves less.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from step_flops import forward_flops
from step_gate import SUMS
from step_models import MODELS
from torch import nn

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data.feed import lay_out
from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Batch, fields_for, to_torch
from logratio.logps.completion import completion_logps, transformer
from logratio.training import load_model
from logratio.training.config import Precision
from logratio.training.models import autocast

CANDIDATE = ROLES.index("candidate")


def apart(store: Store) -> Store:
    """Turn each completion into a separate group, with a copy of the prompt."""
    writer = StoreWriter()
    for group in range(len(store)):
        prompt, completions, masks, _ = store.group(group)
        for ids, mask in zip(completions, masks, strict=True):
            lengths, roles = np.array([len(ids)], np.uint32), np.array([CANDIDATE], np.uint8)
            writer.push(prompt, ids, mask, lengths, roles, 0, group)
    return writer.finish()


def seconds(model: nn.Module, batch: Batch, precision: Precision) -> tuple[float, float]:
    """Do one forward and backward pass; return the seconds and the sum of the log-probs."""
    model.zero_grad(set_to_none=True)
    start = perf_counter()
    with autocast(precision, batch.input_ids.device):
        total = completion_logps(model, batch).sum()
    total.backward()
    value = float(total)  # waits for a GPU
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start, value


def flops(config: Any, store: Store, *, shared: bool) -> float:
    """Count a forward pass over a store's groups."""
    groups = (store.group(group) for group in range(len(store)))
    return sum(forward_flops(config, len(p), [*map(len, c)], shared=shared) for p, c, *_ in groups)


def measure(
    model: nn.Module, batches: Iterable[Batch], rounds: int, precision: Precision
) -> list[list[float]]:
    """Return the seconds of each batch in turns, `[rounds][batches]`, after one turn unseen.

    Raises:
        RuntimeError: their log-probs differ.
    """
    both, found = list(batches), []
    for turn in range(rounds + 1):
        timed, sums = zip(*(seconds(model, batch, precision) for batch in both), strict=True)
        if abs(sums[0] - sums[1]) > SUMS[precision] * abs(sums[0]):
            raise RuntimeError(f"shared {sums[0]}, apart {sums[1]}: not the same work")
        if turn:
            found.append([*timed])
    return found


def main() -> None:
    """Print the row."""
    material, name, device, precision, threads, rounds = sys.argv[1:]
    kept = cast(Precision, precision)
    torch.set_num_threads(int(threads))
    model = load_model(Path(material) / "model", device=device, precision=kept)
    together = Store.open(Path(material) / "pairs.store")
    stores = together, apart(together)
    fields = fields_for("shared", device)
    batches = [
        to_torch(lay_out(store, np.arange(len(store)), fields=fields), device) for store in stores
    ]
    with shared_prompts(transformer(model)):
        found = measure(model, batches, int(rounds), kept)
    tokens = [int(store.shared_lengths().sum()) for store in stores]
    work = [flops(MODELS[name](), together, shared=shared) for shared in (True, False)]
    row = {
        "arm": "ours",
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "measured_pairs": len(together),
        "time_ratio": median(shared / separate for shared, separate in found),
        "token_ratio": tokens[0] / tokens[1],
        "work_ratio": work[0] / work[1],
        "seconds": found,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
