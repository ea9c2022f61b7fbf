"""`run.yaml` describes the run in its folder, and never stops it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import polars
import pyarrow.json
import pytest
import yaml
from conftest import write_pairs
from stop_after import stop_after

from logratio.data import FormatSettings
from logratio.training import ResumeError, RunInterruptedError, SFTConfig, TrainConfig, train
from logratio.training.run_file import RUN_FILE, record_settings, with_absolute_paths


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(tiny_model, [pairs_file], tmp_path / "out", lr=1e-3, batch_size=8)


def written(config: TrainConfig) -> str:
    return (Path(config.output) / RUN_FILE).read_text()


def test_it_holds_the_values_that_the_run_uses(config: TrainConfig) -> None:
    train(config, show_progress=False)
    values = yaml.safe_load(written(config))
    identity = json.loads((Path(config.output) / "training.json").read_text())["identity"]
    for name in ("beta", "precision", "token_budget", "lr", "batch_size"):
        assert values[name] == identity[name], name
    assert "resume" not in values
    assert written(config).startswith("# The settings of a run of logratio ")


def test_a_run_without_beta_reads_back(config: TrainConfig, tmp_path: Path) -> None:
    base = dataclasses.asdict(config) | {"loss": "sft", "output": tmp_path / "sft"}
    sft = SFTConfig(**{**base, "rules": config.rules, "formats": config.formats})
    assert not train(sft, show_progress=False).was_finished
    again = TrainConfig.from_yaml(tmp_path / "sft" / RUN_FILE)
    assert (again.loss, again.beta) == ("sft", None)
    assert train(again, show_progress=False).was_finished


def test_values_without_text_are_named_in_a_comment(config: TrainConfig, pairs_file: Path) -> None:
    table = pyarrow.json.read_json(pairs_file)
    formats = FormatSettings(rows=lambda row: row)
    train(dataclasses.replace(config, data=[table], formats=formats), show_progress=False)
    assert "# Not in this file, because it was a Python object: data\n" in written(config)
    assert "# Not in this file, because it was a Python object: rows\n" in written(config)
    record_settings(dataclasses.replace(config, data=["-"]))
    assert "# The data was standard input" in written(config)
    assert yaml.safe_load(written(config))["data"] == ["-"]


TABLES: dict[str, Callable[[pyarrow.Table], Any]] = {
    "pandas": lambda table: pandas.DataFrame(table.to_pylist()),
    "polars": polars.DataFrame,
    "datasets": lambda table: datasets.Dataset.from_list(table.to_pylist()),
    "one split": lambda table: datasets.DatasetDict(train=TABLES["datasets"](table)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_table_trains_and_is_named_in_a_comment(
    config: TrainConfig, pairs_file: Path, kind: str
) -> None:
    """A frame compares cell by cell, and a `DatasetDict` is a mapping."""
    table = TABLES[kind](pyarrow.json.read_json(pairs_file))
    given = dataclasses.replace(config, data=table, eval_data=table, max_steps=1, report=False)
    assert train(given, show_progress=False).steps == 1
    for name in ("data", "eval_data"):
        assert f"# Not in this file, because it was a Python object: {name}\n" in written(config)
    assert not {"data", "eval_data"} & yaml.safe_load(written(config)).keys()


def test_a_file_that_cannot_be_written_stops_nothing(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(config.output) / RUN_FILE).mkdir(parents=True)
    assert train(config, show_progress=False).steps == 2
    assert "run.yaml could not be written" in capsys.readouterr().err


def test_a_refused_resume_leaves_the_file_of_the_run(config: TrainConfig) -> None:
    with pytest.raises(RunInterruptedError), stop_after(1):
        train(config, show_progress=False)
    before = written(config)
    with pytest.raises(ResumeError, match="differs in lr"):
        train(dataclasses.replace(config, lr=1.0, resume=True), show_progress=False)
    assert written(config) == before
    train(TrainConfig.from_yaml(Path(config.output) / RUN_FILE, resume=True), show_progress=False)
    assert written(config) == before


def test_paths_are_absolute_and_tables_unchanged(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = pyarrow.table({"prompt": []})
    given = dataclasses.replace(config, model="m", output="o", cache="c", data=["d", "-", table])
    found = with_absolute_paths(given)
    assert [found.model, found.output, found.cache] == [str(tmp_path / name) for name in "moc"]
    assert found.data == [str(tmp_path / "d"), "-", table]
    assert found.reference is None


def test_a_mixture_keeps_the_default_beta_of_each_method(tiny_model: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    mixed = TrainConfig(
        tiny_model, data, tmp_path / "out", loss="dpo+simpo", batch_size=4, lr=1e-3, report=False
    )
    losses = [row["loss"] for row in train(mixed, show_progress=False).history]
    again = TrainConfig.from_yaml(tmp_path / "out" / RUN_FILE, output=tmp_path / "again")
    assert again.beta is None
    assert [row["loss"] for row in train(again, show_progress=False).history] == losses
