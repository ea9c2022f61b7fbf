"""Ids that a model has no embedding for are refused at the start, by every command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from tiny_models import WORDS, save_tiny_model

from logratio.data import PreferenceTokenizer
from logratio.export import ExportConfig, plan_export
from logratio.export.plan import ExportError
from logratio.training import (
    EvaluateConfig,
    PrecomputeConfig,
    TrainConfig,
    dataset,
    evaluation,
    precomputation,
    trainer,
)
from logratio.training.dataset import VocabularyError, check_ids, embedding_rows


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has words that it has no embedding for."""
    folder = save_tiny_model(tmp_path_factory.mktemp("larger"))
    _add(folder, {"<new>": len(WORDS)})
    return folder


def _add(folder: Path, tokens: dict[str, int]) -> None:
    (folder / "added_tokens.json").write_text(json.dumps(tokens))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs of which the last uses the new word."""
    path = write_pairs(tmp_path / "pairs.jsonl", 3)
    row = {"prompt": "the cat", "chosen": " sits <new>", "rejected": " runs"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    return path


COMMANDS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "train": lambda model, data, out: trainer.DPOTrainer(
        config=TrainConfig(model, [data], out, device="cpu"), show_progress=False
    ),
    "precompute": lambda model, data, out: precomputation.prepare(
        PrecomputeConfig(model, [data], out, device="cpu"), show_progress=False
    ),
    "evaluate": lambda model, data, _: evaluation.prepare(
        EvaluateConfig(model, model, [data], device="cpu", beta=0.1), show_progress=False
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_id_beyond_the_embedding_is_refused(
    command: str, larger: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(VocabularyError, match=r"embedding has 20 rows.*the id 20 \('<new>'\)"):
        COMMANDS[command](larger, data, tmp_path / "out")


@pytest.mark.parametrize("command", COMMANDS)
def test_ids_that_the_data_does_not_use_are_accepted(
    command: str, larger: Path, pairs_file: Path, tmp_path: Path
) -> None:
    ready = COMMANDS[command](larger, pairs_file, tmp_path / "out")
    assert len(ready.dataset.store) == ready.dataset.report.read == 16


def test_export_refuses_it_too(larger: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its tokenizer has 21 ids, but the policy has 20"):
        plan_export(ExportConfig(larger, tiny_model, tmp_path / "bundle", 0.1))


@pytest.fixture
def other(tmp_path: Path, tiny_model: Path) -> Path:
    """A model with the same words under other ids."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_reference_with_another_vocabulary_is_refused(
    tiny_model: Path, other: Path, pairs_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(VocabularyError, match="has the id 6 there and 5 here"):
        evaluation.prepare(EvaluateConfig(tiny_model, other, [pairs_file], device="cpu", beta=0.1))
    with pytest.raises(VocabularyError, match="cannot be compared"):
        trainer.DPOTrainer(
            config=TrainConfig(
                tiny_model, [pairs_file], tmp_path / "out", reference=other, device="cpu", beta=0.1
            )
        )


def test_a_reference_with_a_smaller_embedding_is_refused(
    larger: Path, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    padded = Path(shutil.copytree(larger, tmp_path / "padded"))
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    assert embedding_rows(padded) == 64
    with pytest.raises(VocabularyError, match="embedding has 20 rows"):
        evaluation.prepare(EvaluateConfig(padded, tiny_model, [data], device="cpu", beta=0.1))


def test_a_folder_that_transformers_tokenizes_differently_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, other: Path
) -> None:
    check_ids(tiny_model, PreferenceTokenizer.load(tiny_model))
    with pytest.raises(VocabularyError, match="transformers tokenizes 'a <"):
        check_ids(other, _with_token(tiny_model, other))
    monkeypatch.setattr(dataset, "AutoTokenizer", None)  # it cannot be read: not compared
    check_ids(other, PreferenceTokenizer.load(tiny_model))


def _with_token(tiny_model: Path, other: Path) -> PreferenceTokenizer:
    tokenizer = PreferenceTokenizer.load(tiny_model)
    tokenizer.files.tokenizer.add_tokens(["<late>"])
    return tokenizer
