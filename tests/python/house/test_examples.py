"""The examples in docstrings run, and print what they show, numbers apart."""

import doctest
import importlib
import pkgutil
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from shared_traces import shared_traces
from tiny_bundle import tiny_bundle
from tiny_models import save_tiny_model

import logratio
from logratio import LoraSettings, PrecomputeConfig, TrainConfig, precompute, train
from logratio.data import PreferenceTokenizer, Source, build_store
from logratio.data.formats.decoder import Decoder
from logratio.logps.completion import batch_of

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MADE = {"DPOTrainer": "policy", "SFTConfig": "sft-model", "export_bundle": "bundle"}
"""Folders that an example makes anew."""
ELSEWHERE = {"CachedDPOTrainer"}
"""Examples that need another library; its tests run the same calls."""


def examples() -> Iterator[doctest.DocTest]:
    """Yield the examples of each docstring of the package."""
    finder, seen = doctest.DocTestFinder(), set()
    for module in pkgutil.walk_packages(logratio.__path__, "logratio."):
        if module.name == "logratio.integrations.trl" or module.name.endswith("__main__"):
            continue
        for found in finder.find(importlib.import_module(module.name)):
            if found.examples and found.name not in seen:
                seen.add(found.name)
                yield found


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, data, cache, store and bundle that examples name."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("model", "sft-model", "base-model", "reference"):
        save_tiny_model(folder / name)
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    pairs = write_pairs(folder / "pairs.jsonl", 16)
    write_pairs(folder / "held-out.jsonl", 16)
    row = '{"prompt": "the cat", "completion": " sits"}\n'
    (folder / "demonstrations.jsonl").write_text(row + row.replace("cat", "dog"))
    model = folder / "sft-model"
    precompute(PrecomputeConfig(model, pairs, folder / "cache"), show_progress=False)
    train(TrainConfig(model, pairs, folder / "policy"), show_progress=False)
    adapter = TrainConfig(model, pairs, folder / "adapter", lora=LoraSettings(rank=2))
    train(adapter, show_progress=False)
    build_store(pairs, PreferenceTokenizer.load(model), folder / "pairs.store")
    shutil.copytree(tiny_bundle(tmp_path_factory) / "bundle", folder / "bundle")
    return folder


class SameBesidesNumbers(doctest.OutputChecker):
    """Compares what is printed, numbers apart; an example that shows nothing may print."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        plain = [re.sub(r"\d[\d,.]*( updates?,)?", "#", text).strip() for text in (want, got)]
        return not want or plain[0] == plain[1]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 14


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: one.name.removeprefix("logratio."))
def test_an_example_runs(
    example: doctest.DocTest, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(material, tmp_path / "here"))
    monkeypatch.chdir(folder)
    shutil.rmtree(MADE.get(example.name.rpartition(".")[2], "nothing"), ignore_errors=True)
    rooms = ("", ".cache", ".data", ".export", ".integrations.table", ".serving", ".training")
    for room in rooms:
        module = importlib.import_module(f"logratio{room}")
        example.globs |= {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    store, _ = build_store(folder / "pairs.jsonl", PreferenceTokenizer.load(folder / "reference"))
    example.globs |= {"torch": torch, "store": store, "batch_of": batch_of, "Decoder": Decoder}
    example.globs |= {"Source": Source}
    runner = doctest.DocTestRunner(SameBesidesNumbers(), verbose=False)
    shown: list[str] = []
    with shared_traces():
        failed = runner.run(example, out=shown.append).failed
    assert failed == 0, "".join(shown)
