"""Ranks of a test that count what they do: collectives, tokenized rows, gathered bytes."""

import json
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rank_workers import train
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from logratio.cli.app import main
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.training import update_loop
from logratio.training.parallel import division
from logratio.training.update import Updater


class Collectives(TorchDispatchMode):
    """Counts the collectives in its block, by the names of torch's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, _types: Any, given: Any = (), named: Any = None
    ) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.found[function.name().partition("::")[2].partition(".")[0]] += 1
        return function(*given, **(named or {}))


def train_counting_collectives(
    settings: Mapping[str, Any], file: str, whole_gradients: bool = True
) -> None:
    """Train; write the collectives of each update, and its number of micro-batches, as JSON."""
    division.SMALL_SHARE = 1.0 if whole_gradients else 0.0
    update, rows = Updater.update, list[dict[str, int]]()

    def counted(self: Updater, step: int, rate: float, batches: Any, most: int = 0) -> Any:
        with Collectives() as collectives:
            result = update(self, step, rate, batches, most)
        rows.append({**collectives.found, "micro-batches": most})
        return result

    Updater.update = counted  # type: ignore[method-assign]
    train(settings)
    Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(rows))


def count_tokenized(settings: Mapping[str, Any], file: str) -> None:
    """Train; write how many rows this rank tokenized."""
    write_tokenized(file, lambda: train(settings))


def count_tokenized_by(arguments: Sequence[str], file: str) -> None:
    """Run a command; write how many rows this rank tokenized."""
    write_tokenized(file, lambda: main(arguments))


def write_tokenized(file: str, work: Callable[[], None]) -> None:
    """Write the number of rows that this rank's tokenizers encode during `work`."""
    rows = 0
    pairs, records = PreferenceTokenizer.encode_pairs, PreferenceTokenizer.encode_records

    def of_pairs(self: PreferenceTokenizer, columns: Sequence[Any]) -> Any:
        nonlocal rows
        rows += len(columns[0])
        return pairs(self, columns)

    def of_records(self: PreferenceTokenizer, given: Sequence[Any]) -> Any:
        nonlocal rows
        rows += len(given)
        return records(self, given)

    PreferenceTokenizer.encode_pairs = of_pairs  # type: ignore[method-assign]
    PreferenceTokenizer.encode_records = of_records  # type: ignore[method-assign,assignment]
    try:
        work()
    finally:
        Path(f"{file}.{os.environ['RANK']}").write_text(str(rows))


def count_gathered(settings: Mapping[str, Any], file: str) -> None:
    """Train; write the most bytes of whole weights that were in memory at once at the end.

    Gloo's thread may let go of a weight a moment after the collective: ranks that keep none wait.
    """
    gather, whole_weights, most = DTensor.full_tensor, vars(update_loop)["whole_weights"], 0
    alive: list[Callable[[], Any]] = []

    def gathered(self: DTensor, **options: Any) -> Any:
        nonlocal most
        whole = gather(self, **options)
        alive.append(weakref.ref(whole.untyped_storage()))
        end = time.monotonic() + (2 if os.environ["RANK"] != "0" else 0)
        while sum(ref() is not None for ref in alive) > 1 and time.monotonic() < end:
            time.sleep(0.01)
        most = max(most, sum(one.nbytes() for ref in alive if (one := ref()) is not None))
        return whole

    def watched(*given: Any, **options: Any) -> Any:
        DTensor.full_tensor = gathered  # type: ignore[method-assign]
        return whole_weights(*given, **options)

    vars(update_loop)["whole_weights"] = watched
    train(settings)
    Path(f"{file}.{os.environ['RANK']}").write_text(str(most))
