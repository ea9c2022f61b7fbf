"""The command line: flags match config fields, help texts, one-line error messages."""

import dataclasses
import gzip
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import Run

from logratio._rust import CacheWriter
from logratio.cli import evaluate
from logratio.cli import precompute as precomputing
from logratio.cli import train as commands
from logratio.cli.app import main, spread
from logratio.data import FormatSettings, TokenizationRules
from logratio.intervals import wilson
from logratio.training import (
    Cluster,
    EvaluateConfig,
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    precompute,
)


def flags(command: Callable[..., None]) -> set[str]:
    own = {"config", "dry_run", "stagewise", "json_file", "lora_config"}  # no fields
    own |= {"bundle", "base"}  # instead of a policy
    own |= {field.name for field in dataclasses.fields(Cluster)}
    return set(inspect.signature(command).parameters) - own


def fields(config: type) -> set[str]:
    nested = {"rules": TokenizationRules, "lora": LoraSettings, "formats": FormatSettings}
    names = {field.name for field in dataclasses.fields(config)}
    for name in names & nested.keys():
        inner = {field.name for field in dataclasses.fields(nested[name])}
        prefix = "lora_" if name == "lora" else ""
        names |= {prefix + field for field in inner}
    return names - {"rules", "formats", "demonstrations", "kinds"}  # set by the command


@pytest.mark.parametrize(
    ("command", "config"),
    [
        (commands.train, TrainConfig),
        (precomputing.precompute, PrecomputeConfig),
        (evaluate.evaluate, EvaluateConfig),
    ],
)
def test_every_flag_is_a_field_and_every_field_a_flag(
    command: Callable[..., None], config: type
) -> None:
    renamed = {
        "append_eos": "eos",
        "text_as": "chat",
        "lora_targets": "lora_target",
        "lora_use_rslora": "lora_rslora",
        "lora_use_dora": "lora_dora",
        "format": "format_name",
        "loss_options": "loss_option",
    }
    expected = {renamed.get(name, name) for name in fields(config)}
    assert flags(command) == expected


@pytest.mark.parametrize("command", [commands.train, precomputing.precompute, evaluate.evaluate])
def test_defaults_agree_with_the_python_call(command: Callable[..., None]) -> None:
    config = {"train": TrainConfig, "precompute": PrecomputeConfig, "evaluate": EvaluateConfig}[
        command.__name__
    ]
    parameters = inspect.signature(command).parameters
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING and field.name not in ("lora", "loss"):
            assert parameters[field.name].default == field.default, field.name


def test_data_takes_several_files() -> None:
    lists = {"--data": False, "--beta": True}
    assert spread(["train", "--data", "a", "b", "--lr", "1", "--data", "c"], lists) == (
        ["train", "--data", "a", "--data", "b", "--lr", "1", "--data", "c"]
    )
    assert spread(["rank", "--data=a", "b"], lists) == ["rank", "--data=a", "b"]
    assert spread(["--data", "a,b", "--beta", "1,2", "3"], lists) == (
        ["--data", "a,b", "--beta", "1", "--beta", "2", "--beta", "3"]
    )
    assert spread(["--beta=1, 2", "--lr", "1", "--beta", ","], lists) == (
        ["--beta=1", "--beta=2", "--lr", "1", "--beta", ","]
    )


def test_help_lists_and_explains_flags(run: Run) -> None:
    code, out, _ = run("train", "--help")
    assert code == 0
    for word in ("--beta", "keeps the policy closer", "--no-eos", "--lora-rank", "--resume"):
        assert word in " ".join(out.replace("│", " ").split())


def test_precompute_train_evaluate(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    shared = ("--model", tiny_model, "--data", pairs_file)
    code, out, err = run("precompute", *shared, "--cache", tmp_path / "cache")
    assert code == 0, err
    assert "32 completions scored" in out
    assert "16 rows read: 16 kept" in err
    assert "needs about" in err
    run_train = ("train", *shared, "--cache", tmp_path / "cache", "--output", tmp_path / "out")
    code, out, err = run(*run_train, "--lr", "3e-3", "--batch-size", "4", "--epochs", "6")
    assert code == 0, err
    assert "24 updates" in out
    policy = ("--policy", tmp_path / "out", "--reference", tiny_model, "--data", pairs_file)
    code, out, _ = run("evaluate", *policy, "--samples", "4", "--json", tmp_path / "result.json")
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["pairs"] == 16
    low, high = wilson(result["accuracy"], 16)
    assert result["accuracy_interval"] == [low, high]
    assert f"{result['accuracy']:.3f} (95 %: {low:.3f} to {high:.3f})" in out
    assert result["kl"]["samples"] == 4
    code, out, _ = run("evaluate", *policy, "--json", "-")
    assert code == 0
    assert json.loads(out)["pairs"] == 16
    code, out, _ = run("data", "report", pairs_file, "--tokenizer", tiny_model, "--json", "-")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_dry_run_writes_nothing_but_the_forecast(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    arguments = ("--model", tiny_model, "--data", pairs_file, "--dry-run")
    code, out, err = run("train", *arguments, "--output", tmp_path / "out")
    assert (code, out) == (0, "")
    assert "needs about" in err
    assert run("precompute", *arguments, "--cache", tmp_path / "cache")[0] == 0
    evaluated = ("--policy", tiny_model, "--reference", tiny_model, "--beta", "0.1", "--json")
    code, _, err = run("evaluate", *evaluated, tmp_path / "e.json", *arguments[2:])
    assert code == 0, err
    exported = ("--policy", tiny_model, "--reference", tiny_model, "--beta", "0.1", "--output")
    code, _, err = run("export", *exported, tmp_path / "deep" / "bundle", "--dry-run")
    assert code == 0, err
    assert list(tmp_path.iterdir()) == [pairs_file]


GOOD = {"prompt": "the cat", "chosen": " sits", "rejected": " runs"}
BAD_ROWS = [
    ('{"prompt": "a", "chosen": ', r"pairs.jsonl:3.*\[E102\]|\[E101\]"),
    (json.dumps({"prompt": "a", "chosen": "b"}), "E201"),
    (json.dumps({"prompt": "a", "chosen": 3, "rejected": "b"}), "E203"),
]


def write(path: Path, *rows: str) -> Path:
    text = "".join(row + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
@pytest.mark.parametrize(("row", "code"), BAD_ROWS)
def test_malformed_rows_are_named(
    run: Run, tiny_model: Path, tmp_path: Path, name: str, row: str, code: str
) -> None:
    good = json.dumps(GOOD)
    data = write(tmp_path / name, good, good.replace("cat", "dog"), row)
    ended, _, err = run(
        "train", "--model", tiny_model, "--data", data, "--output", tmp_path / "out"
    )
    assert ended == 2
    assert f"{name}:3" in err
    assert any(part.strip("\\[]") in err for part in code.split("|")[-1:]) or "E10" in err


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({**GOOD, "chosen": ""}, "R301"),
        ({**GOOD, "rejected": " sits"}, "R302"),
        ({**GOOD, "prompt": "the cat " * 30}, "R304"),
    ],
)
def test_useless_rows_are_counted_and_training_continues(
    run: Run, tiny_model: Path, tmp_path: Path, row: dict[str, str], code: str
) -> None:
    data = write(tmp_path / "pairs.jsonl", json.dumps(GOOD), json.dumps(row))
    arguments = ("--model", tiny_model, "--data", data, "--max-length", "32")
    ended, _, err = run("train", *arguments, "--output", tmp_path / "out")
    assert ended == 0, err
    assert "2 rows read: 1 kept, 1 refused" in err
    assert code in err
    assert "pairs.jsonl:2" in err
    (refused,) = (tmp_path / "out" / "refused.jsonl").read_text().splitlines()
    assert json.loads(refused)["code"] == code


def one_line(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    return line


def test_adapter_settings_without_adapters_are_refused(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    arguments = ("--model", tiny_model, "--data", pairs_file, "--lora-rank", "4")
    ended, _, err = run("train", *arguments, "--output", tmp_path / "out")
    assert ended == 2
    assert "without --lora" in one_line(err)


def test_unknown_model_folder(run: Run, pairs_file: Path, tmp_path: Path) -> None:
    arguments = ("--model", tmp_path / "nowhere", "--data", pairs_file)
    ended, _, err = run("train", *arguments, "--output", tmp_path / "out")
    assert ended == 2
    assert "no such model folder" in one_line(err)


@pytest.mark.parametrize("device", ["nonsense", "cuda:97"])
def test_unknown_device(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path, device: str
) -> None:
    arguments = ("--model", tiny_model, "--data", pairs_file, "--device", device)
    ended, _, err = run("train", *arguments, "--output", tmp_path / "out")
    assert ended == 2
    assert f"device '{device}' cannot be used" in one_line(err)


def test_unknown_data_file(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--model", tiny_model, "--data", tmp_path / "nothing.jsonl")
    ended, _, err = run("train", *arguments, "--output", tmp_path / "out")
    assert ended == 2
    assert "nothing.jsonl" in one_line(err)


def test_unwritable_output_folder(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("--model", tiny_model, "--data", pairs_file)
    ended, _, err = run("train", *arguments, "--output", tmp_path / "file" / "out")
    assert ended == 2
    assert "cannot write here" in one_line(err)


def test_cache_made_with_another_model(
    run: Run,
    tiny_model: Path,
    make_model: Callable[..., Path],
    pairs_file: Path,
    tmp_path: Path,
) -> None:
    other = make_model("other", 3)
    precompute(PrecomputeConfig(other, [pairs_file], tmp_path / "cache"), show_progress=False)
    shared = ("--model", tiny_model, "--data", pairs_file, "--cache", tmp_path / "cache")
    ended, _, err = run("train", *shared, "--output", tmp_path / "out")
    assert ended == 2
    assert "filled with a different reference" in one_line(err)
    assert "weights" in one_line(err)


def test_disk_full_during_precompute(
    run: Run,
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Log-probs written before the error are kept, and the next run resumes from them."""
    from logratio.training import reference_scorer

    monkeypatch.setattr(reference_scorer, "BLOCK_TOKENS", 1)
    real = CacheWriter
    full = FullDisk(real, blocks=2)
    monkeypatch.setattr(reference_scorer, "CacheWriter", full)
    shared = ("--model", tiny_model, "--data", pairs_file, "--cache", tmp_path / "cache")
    ended, _, err = run("precompute", *shared, "--token-budget", "16")
    assert ended == 2
    assert "the disk is full" in one_line(err)
    monkeypatch.setattr(reference_scorer, "CacheWriter", real)
    ended, out, _ = run("precompute", *shared)
    assert ended == 0
    scored = int(out.split()[0])
    assert 0 < scored < 32


class FullDisk:
    """A cache writer on a disk with room for a few blocks."""

    def __init__(self, real: type, blocks: int) -> None:
        self.real, self.left = real, blocks

    def __call__(self, *arguments: object) -> "FullDisk":
        self.writer = self.real(*arguments)
        return self

    @property
    def file_bytes(self) -> int:
        return int(self.writer.file_bytes)

    def append(self, *arguments: Sequence[object]) -> None:
        if self.left == 0:
            raise OSError(28, "No space left on device", "x.journal")
        self.left -= 1
        self.writer.append(*arguments)

    def close(self) -> None:
        self.writer.close()


def test_an_install_without_torch_names_the_missing_package(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("logratio.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    ended, _, err = run("train", "--model", "m", "--data", "d", "--output", tmp_path)
    assert ended == 2
    assert one_line(err) == "error: this command needs torch: pip install logratio"


def test_a_bug_in_the_program_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("logratio.training.trainer.check_folders", lambda _: 1 / 0)
    arguments = ["--model", str(tiny_model), "--data", str(pairs_file), "--output", str(tmp_path)]
    with pytest.raises(ZeroDivisionError):
        main(["train", *arguments])
