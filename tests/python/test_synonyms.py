"""Flags of other trainers and ids of the hub are accepted, or answered with the alternative."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Run

from logratio import TrainConfig
from logratio.cli.app import app, flags_of
from logratio.errors import LogratioError, fetching_advice
from logratio.synonyms import (
    INSTEAD,
    SAME,
    SWITCHES,
    UNSUPPORTED,
    ForeignFlagError,
    instead_of,
    translated,
)

COMMAND: Any = typer.main.get_command(app)
TRAIN = flags_of(COMMAND, ["train", "--model", "m"])


def test_the_same_meaning_is_accepted(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    code, out, err = run(
        *("train", "--model_name_or_path", tiny_model, "--train-file", pairs_file),
        *("--output_dir", tmp_path / "out", "--learning-rate", "1e-3", "--num-train-epochs=2"),
        *("--loss-type", "sigmoid", "--batch_size", "8", "--use-peft", "--lora-r", "2"),
    )
    assert code == 0, err
    assert "4 updates" in out
    settings = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (settings["lr"], settings["loss"], settings["lora"]["rank"]) == (1e-3, "dpo", 2)


def test_the_tables_refer_to_existing_flags_and_shadow_none() -> None:
    every = TRAIN | flags_of(COMMAND, ["export"]) | flags_of(COMMAND, ["precompute"])
    assert set(SAME.values()) <= every
    assert {flag for flag, _ in SWITCHES.values()} <= TRAIN
    assert not (SAME.keys() | INSTEAD.keys() | UNSUPPORTED.keys()) & TRAIN
    assert not SAME.keys() & INSTEAD.keys()
    named = {flag for text in INSTEAD.values() for flag in re.findall("--[a-z-]+", text)}
    assert named <= every | {"--repo-type", "--local-dir", "--quantization"}


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--bf16", "--precision bf16"),
        ("--per_device_train_batch_size", "--batch-size"),
        ("--gradient-accumulation-steps=4", "--batch-size"),
        ("--gradient_checkpointing", "--activation-checkpointing"),
        ("--dataset-name", "--repo-type dataset"),
        ("--do-eval", "give `--eval-data FILE`"),
        ("--trust-remote-code", "error: --trust-remote-code is not supported: code in a model"),
        ("--lora-modules", "--lora-target NAME"),
        ("--deepspeed", "error: --deepspeed is not supported: torch's DDP and FSDP2 divide"),
    ],
)
def test_a_flag_of_another_trainer_is_answered(run: Run, flag: str, answer: str) -> None:
    code, _, err = run("train", flag, "x")
    assert code == 2
    assert answer in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "value", "flags", "fields", "keys"),
    [
        (
            *("desirable_weight", 1.3, "--loss-option desirable_weight=1.3"),
            *('loss_options={"desirable_weight": 1.3}', "loss_options: {desirable_weight: 1.3}"),
        ),
        (
            *("cpo_alpha", 2, "--loss cpo --loss-option alpha=2"),
            *('loss="cpo", loss_options={"alpha": 2}', "loss: cpo, loss_options: {alpha: 2}"),
        ),
        (
            *("simpo_gamma", 0.7, "--loss simpo --gamma 0.7"),
            *('loss="simpo", gamma=0.7', "loss: simpo, gamma: 0.7"),
        ),
        ("rpo_alpha", 0.5, "dpo+sft:0.5", 'loss="dpo+sft:0.5"', "loss: dpo+sft:0.5"),
    ],
)
def test_advice_repeats_the_number_that_was_given(
    given: str, value: float, flags: str, fields: str, keys: str, tmp_path: Path
) -> None:
    for command in ([f"--{given}", f"{value}"], [f"--{given}={value}"]):
        with pytest.raises(ForeignFlagError) as on_command_line:
            translated(command, TRAIN)
        assert f"{flags}`" in str(on_command_line.value)
    setting: dict[str, Any] = {given: value}
    with pytest.raises(LogratioError, match=re.escape(fields)):
        TrainConfig("m", "d", "o", **setting)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\ndata: d\noutput: o\n{given}: {value}\n")
    with pytest.raises(LogratioError, match=re.escape(keys)):
        TrainConfig.from_yaml(file)


def test_advice_without_a_number_shows_an_example() -> None:
    assert instead_of("desirable_weight") == 'use `loss_options={"desirable_weight": 1}`'
    with pytest.raises(ForeignFlagError, match="desirable_weight=1`"):
        translated(["--desirable-weight", "--lora"], TRAIN)


def test_the_commands_flags_take_precedence() -> None:
    assert translated(["--max_length", "5"], TRAIN) == ["--max-length", "5"]
    assert (
        translated(["rank", "--output", "--learning-rate"], {"--output"})[-1] == "--learning-rate"
    )
    assert translated(["--label", "a_b: 1=x"], TRAIN) == ["--label", "a_b: 1=x"]
    assert translated(["--loss", "sigmoid"], TRAIN) == ["--loss", "sigmoid"]
    assert translated(["--fp16", "x"], {"--fp16"}) == ["--fp16", "x"]
    assert translated(["--lora_target_modules", "q"], TRAIN) == ["--lora-target", "q"]
    with pytest.raises(ForeignFlagError, match="no option --fp16"):
        translated(["--fp16"], TRAIN)


def test_a_switch_means_a_value_of_another_flag() -> None:
    assert translated(["--load_in_4bit", "--lora"], TRAIN) == ["--quantization=4bit", "--lora"]
    with pytest.raises(ForeignFlagError, match="of `logratio precompute` and `logratio train`"):
        translated(["--load-in-8bit"], flags_of(COMMAND, ["evaluate"]))
    given: dict[str, Any] = {"load_in_8bit": True}
    assert TrainConfig("m", "d", "o", **given).quantization == "8bit"
    with pytest.raises(LogratioError, match="means quantization, which is given too"):
        TrainConfig("m", "d", "o", quantization="4bit", **given)
    off: dict[str, Any] = {"load_in_8bit": False}
    assert TrainConfig("m", "d", "o", **off).quantization is None


def test_an_unknown_flag_is_an_error(run: Run) -> None:
    code, _, err = run("train", "--learnin-rate", "1")
    assert code == 2
    assert err == "error: no option --learnin-rate: did you mean --learning-rate?\n"
    _, _, err = run("train", "--quiet")
    assert err == "error: no option --quiet (see `logratio train --help`)\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--lr", "abc"), "--lr must be a number, not 'abc'"),
        (("train", "--batch-size=1.5"), "--batch-size must be a whole number, not '1.5'"),
        (
            ("train", "--lr-scheduler", "polynomial"),
            "--lr-scheduler must be one of cosine, linear, constant, wsd, not 'polynomial'",
        ),
        (
            ("serve", "--bundle", "b", "--port", "99999"),
            "--port must be at most 65535, not '99999'",
        ),
        (("data", "inspect", "x", "--first", "0"), "--first must be at least 1, not '0'"),
    ],
)
def test_a_bad_value_is_answered_in_plain_words(
    run: Run, arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err) == (2, "", f"error: {words}\n")


def test_no_arguments_print_the_help(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (2, "")
    assert "Usage: logratio" in out


def test_advice_for_python_names_settings_and_no_flags() -> None:
    for flag in (*INSTEAD, *UNSUPPORTED):
        advice = instead_of(flag[2:].replace("-", "_"))
        assert advice
        flags = re.findall(r"--[a-z-]+", advice)
        assert not [name for name in flags if name not in ("--repo-type", "--local-dir")], advice
    assert not INSTEAD.keys() & UNSUPPORTED.keys()
    assert not [text for text in UNSUPPORTED.values() if "--" in text]


HUB = [
    ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"),
    ("https://huggingface.co/Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir"),
    ("distilgpt2", "hf download distilgpt2 --local-dir distilgpt2"),
]


@pytest.mark.parametrize(("name", "advice"), HUB)
def test_a_model_id_where_a_folder_is_expected(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path, name: str, advice: str
) -> None:
    data = ("--data", pairs_file)
    pair = ("--policy", name, "--reference", tiny_model, "--beta", "0.1")
    for given in (
        ("train", "--model", name, *data, "--output", tmp_path / "o"),
        ("train", "--model", tiny_model, "--reference", name, *data, "--output", tmp_path / "o"),
        ("precompute", "--model", name, *data, "--cache", tmp_path / "c"),
        ("evaluate", *pair, *data),
        ("export", *pair, "--output", tmp_path / "b"),
        ("data", "build", pairs_file, "--tokenizer", name, "--output", tmp_path / "s"),
        ("data", "inspect", pairs_file, "--tokenizer", name),
    ):
        code, _, err = run(*given)
        assert code == 2
        assert advice in err
    assert not (tmp_path / "o").exists()


def test_a_dataset_id_where_files_are_expected(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    name = "trl-lib/ultrafeedback_binarized"
    advice = f"hf download {name} --repo-type dataset --local-dir ultrafeedback_binarized"
    for given in (
        ("train", "--model", tiny_model, "--data", name, "--output", tmp_path / "o"),
        ("data", "inspect", name),
        ("data", "build", name, "--tokenizer", tiny_model, "--output", tmp_path / "s"),
    ):
        code, _, err = run(*given)
        assert code == 2
        assert advice in err


def test_an_adapter_whose_base_is_on_the_hub(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": "Org/Base-1B", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    given = ("--data", pairs_file, "--output", tmp_path / "o")
    code, _, err = run("train", "--model", folder, *given)
    assert code == 2
    assert f"hf download Org/Base-1B --local-dir {folder}/Org/Base-1B`" in err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("data/train.jsonl", "dataset"), ("pairs.jsonl", "dataset"), ("a/b/c", "model")),
        *(("org/x.jsonl", "dataset"), ("/tmp/model", "model"), ("../model", "model")),
        *(("data/model", "model"), ("", "model")),
    ],
)
def test_a_plain_path_is_not_an_id(name: str, kind: Any) -> None:
    assert fetching_advice(name, kind) == ""


def test_a_name_in_an_existing_folder_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fetching_advice("models/tiny", "model")
    (tmp_path / "models").mkdir()
    assert not fetching_advice("models/tiny", "model")


class TestExitCodes:
    """0 success, 1 a check found a problem, 2 not possible, 128 + n after a signal."""

    def test_help_states_them(self, run: Run) -> None:
        code, out, _ = run("--help")
        assert code == 0
        assert "Exit codes: 0, success; 1, a check" in " ".join(out.replace("│", " ").split())

    def test_damage_is_1_and_the_sound_stores_are_still_named(
        self, run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
    ) -> None:
        stores = [tmp_path / "a.store", tmp_path / "b.store"]
        for store in stores:
            given = (pairs_file, "--tokenizer", tiny_model, "--output", store)
            assert run("data", "build", *given)[0] == 0
        data = bytearray(stores[0].read_bytes())
        data[len(data) // 2] ^= 1
        stores[0].write_bytes(data)
        code, out, _ = run("data", "verify", *stores)
        assert code == 1
        assert "not sound: " in out
        assert f"{stores[1]}: sound" in out
        assert run("data", "verify", stores[1])[0] == 0
        assert run("data", "verify", tmp_path / "nothing.store")[0] == 2

    def test_unknown_data_is_1(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"question": "q"}\n')
        assert run("data", "inspect", path)[0] == 1

    @pytest.mark.parametrize(
        "arguments", [("train",), ("train", "--lr", "fast"), ("nonsense",), ("--nonsense",)]
    )
    def test_a_request_that_cannot_be_read_is_2(self, run: Run, arguments: tuple[str, ...]) -> None:
        assert run(*arguments)[0] == 2

    def test_the_process_itself(self, tmp_path: Path) -> None:
        """A few cases in real processes; the others are called directly."""

        def ended(*arguments: str) -> tuple[int, str]:
            command = [sys.executable, "-m", "logratio", *arguments]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
            )
            return done.returncode, done.stderr

        assert ended("--version") == (0, "")
        code, err = ended("data", "inspect", "nothing.jsonl")
        assert (code, err) == (2, "error: nothing.jsonl: no such file or folder\n")
        code, err = ended("train", "--bf16")
        assert code == 2
        assert err == "error: no option --bf16: use `--precision bf16`\n"
