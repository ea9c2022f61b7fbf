"""Through how many files a reader follows four pieces of work: python tests/support/trace_paths.py.

Counts the files of the package whose functions are called, and how often a call goes from one file
to another. Module bodies, which run at import, are not counted. `PYTHONPATH` must name `tests`,
`tests/support` and, for a tree that is not installed, `python`.
"""

import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from conftest import write_pairs
from tiny_models import save_tiny_model

import logratio
from logratio import (
    ExportConfig,
    FormatSettings,
    Reranker,
    TokenizationRules,
    build_store,
    export_bundle,
)
from logratio.cli.app import main
from logratio.data import PreferenceTokenizer
from logratio.data.feed import lay_out
from logratio.logps.attention import shared_prompts
from logratio.logps.batch import Batch, to_torch
from logratio.logps.completion import completion_logps, transformer
from logratio.training import load_model

PACKAGE = str(Path(logratio.__file__).parent)


class StepReachedError(Exception):
    """The first `optimizer.step()` was called."""


def traced(work: Callable[[], object]) -> list[str]:
    """Return the file of each call of the package's functions while `work` runs, in order."""
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name != "<module>":
            files.append(code.co_filename.removeprefix(PACKAGE + "/"))

    sys.setprofile(note)
    try:
        work()
    except StepReachedError:
        pass
    finally:
        sys.setprofile(None)
    return files


def to_the_first_step(model: Path, data: Path, output: Path) -> None:
    """Run `logratio train` up to the first update of the weights."""

    def reached(*_: object, **__: object) -> None:
        raise StepReachedError

    step = torch.optim.AdamW.step
    torch.optim.AdamW.step = reached  # type: ignore[method-assign]
    try:
        main(["train", "--model", str(model), "--data", str(data), "--output", str(output)])
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]


def say(what: str, files: list[str]) -> None:
    """Print a path's length."""
    changes = sum(before != after for before, after in pairwise(files))
    print(f"{what}: {len(set(files))} files, {changes} changes of file")
    if "--files" in sys.argv:
        print("  " + "\n  ".join(dict.fromkeys(files)))


def run(folder: Path) -> None:
    """Trace the four paths."""
    model, data = save_tiny_model(folder / "model"), write_pairs(folder / "pairs.jsonl", 16)
    one = write_pairs(folder / "one.jsonl", 1)
    tokenizer = PreferenceTokenizer.load(model, TokenizationRules())
    formats = FormatSettings()
    say("train to the first step", traced(lambda: to_the_first_step(model, data, folder / "out")))
    say("one row of JSON lines", traced(lambda: build_store([one], tokenizer, formats=formats)))
    store, _ = build_store([one], tokenizer)
    policy = load_model(model)

    def work(batch: Batch) -> None:
        completion_logps(policy, batch).sum().backward()

    with shared_prompts(transformer(policy)):
        batch = to_torch(lay_out(store, np.arange(1), "shared"), "cpu")
        say(
            "a micro-batch to its gradients",
            traced(lambda: completion_logps(policy, batch).sum().backward()),
        )
    export_bundle(ExportConfig(model, model, folder / "bundle", 0.1), show_progress=False)
    reranker = Reranker.load(folder / "bundle")
    say("ranking two candidates", traced(lambda: reranker.rank("the cat", [" sits", " runs"])))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        run(Path(name))
