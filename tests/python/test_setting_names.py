"""Messages name settings as their reader does: flags on the command line, fields in Python."""

from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Run

from logratio.cli.app import app
from logratio.config_file import _places  # the keys of a file, which are the fields' paths
from logratio.errors import ConfigError
from logratio.progress import say
from logratio.setting_names import FIELDS, flag_of, flags_in_messages, with_fields
from logratio.training import EvaluateConfig, PrecomputeConfig, SweepConfig, TrainConfig
from logratio.training.trainer import DPOTrainer

CONFIGS = {
    "train": TrainConfig,
    "precompute": PrecomputeConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
}
OF_THE_COMMAND = {
    *("help", "config", "dry-run", "stagewise", "json", "lora", "lora-config", "demonstrations"),
}
OF_THE_CLUSTER = {
    *("world-size", "gpu", "gpus-per-host", "compute-share", "link-share", "network-gbps"),
}
"""Flags of `Cluster`, which is no part of a run's settings."""


def flags_of(command: str) -> set[str]:
    commands: Any = typer.main.get_command(app)
    options = [one for p in commands.commands[command].params for one in p.opts]
    return {one.removeprefix("--") for one in options if one.startswith("--")} - (
        OF_THE_COMMAND | OF_THE_CLUSTER
    )


@pytest.mark.parametrize("command", CONFIGS)
def test_every_flag_has_a_field_under_the_name_that_messages_show(command: str) -> None:
    places = {".".join(place.path) for place in _places(CONFIGS[command]).values()}
    places = {path.removeprefix("base.") for path in places}
    places |= {"resume", "overwrite", "bundle", "base"}
    shown = {flag: with_fields(f"--{flag}").partition("=")[0] for flag in flags_of(command)}
    assert len(shown) > 10
    assert {flag: field for flag, field in shown.items() if field not in places} == {}


def test_every_exception_of_the_table_is_a_flag() -> None:
    second = {"no-eos", "text", "no-report"}
    known = {flag for command in CONFIGS for flag in flags_of(command)}
    assert FIELDS.keys() - second <= known | OF_THE_COMMAND


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--loss sft has no --beta", "loss sft has no beta"),
        ("continue it with --resume", "continue it with resume=True"),
        ("train them with --lora", "train them with lora=LoraSettings()"),
        ("set --max-length to 7", "set rules.max_length to 7"),
        ("run `logratio cache verify --json x`", "run `logratio cache verify --json x`"),
        ("a--b and 1--2, a -- b", "a--b and 1--2, a -- b"),
    ],
)
def test_flags_become_fields_outside_of_commands(text: str, shown: str) -> None:
    assert with_fields(text) == shown
    assert str(ConfigError(text)) == shown
    with flags_in_messages():
        assert str(ConfigError(text)) == text
    assert str(ConfigError(text)) == shown


def test_notes_are_worded_too(capsys: pytest.CaptureFixture[str]) -> None:
    say("give --eval-share")
    with flags_in_messages():
        say("give --eval-share")
    assert capsys.readouterr().err == "give eval_share\ngive --eval-share\n"


@pytest.mark.parametrize("field", ["rank", "targets", "use_dora", "modules_to_save"])
def test_a_nested_field_has_the_flag_of_the_command(field: str) -> None:
    assert with_fields(flag_of("LoraSettings", field)) == f"lora.{field}"
    assert flag_of("LoraSettings", field)[2:] in flags_of("train")


REFUSED: list[tuple[dict[str, Any], list[str], str, str]] = [
    (
        {"eval_every": 3},
        ["--eval-every", "3"],
        "eval_every needs held-out data: give eval_data or eval_share",
        "--eval-every needs held-out data: give --eval-data or --eval-share",
    ),
    ({"lr": -1.0}, ["--lr", "-1"], "lr must be above 0", "--lr must be above 0"),
    (
        {"loss": "sft", "beta": 1.0},
        ["--loss", "sft", "--beta", "1"],
        "loss sft has no beta",
        "--loss sft has no --beta",
    ),
    (
        {"precompute": True},
        ["--precompute"],
        "precompute=True fills a cache: give its folder as cache",
        "--precompute fills a cache: give its folder as --cache",
    ),
    (
        {"early_stop": 2, "eval_share": 0.5},
        ["--early-stop", "2", "--eval-share", "0.5"],
        "early_stop needs best_metric",
        "--early-stop needs --best-metric",
    ),
]


@pytest.mark.parametrize(("settings", "flags", "fields", "on_command_line"), REFUSED)
def test_the_same_refusal_in_python_on_the_command_line_and_in_a_file(
    run: Run,
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    flags: list[str],
    fields: str,
    on_command_line: str,
) -> None:
    with pytest.raises(ConfigError) as refused:
        DPOTrainer(str(tiny_model), str(pairs_file), output=str(tmp_path / "out"), **settings)
    assert fields in str(refused.value)
    assert "--" not in str(refused.value)
    given = ("--model", tiny_model, "--data", pairs_file, "--output", tmp_path / "out")
    code, _, err = run("train", *given, *flags)
    assert code == 2
    assert on_command_line in err


def test_a_line_of_a_file_is_refused_by_the_names_of_the_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nlr: -1\n")
    code, _, err = run("train", "--config", file)
    assert (code, "run.yaml:4: lr must be above 0" in err) == (2, True)
    file.write_text("model: m\ndata: d\noutput: o\nlora:\n  rank: 0\n")
    code, _, err = run("train", "--config", file)
    assert (code, "run.yaml:5: lora.rank must be at least 1" in err) == (2, True)
