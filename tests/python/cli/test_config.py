"""`--config`: a file's settings are the defaults of the flags."""

import json
from pathlib import Path

import pytest
from conftest import Run
from safetensors.torch import load_file

from logratio.training import LoraSettings, TrainConfig
from logratio.training.trainer import DPOTrainer


@pytest.fixture
def file(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {pairs_file}\noutput: {tmp_path / 'out'}\n"
        "learning_rate: 1e-3\nbatch-size: 8\ncompile: off\nlora: {r: 2, target_modules: [q_proj]}\n"
        "eos: false\nformat: trl\ncolumns: {prompt: prompt}\n"
    )
    return path


def settings_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "training.json").read_text())
    return found


def test_required_flags_may_be_in_the_file_and_flags_override_it(
    run: Run, file: Path, tmp_path: Path
) -> None:
    code, out, err = run("train", "--config", file, "--lr", "2e-3", "--lora-alpha", "4", "--eos")
    assert code == 0, err
    assert "2 updates" in out
    settings = settings_of(tmp_path / "out")
    assert (settings["lr"], settings["batch_size"], settings["loss"]) == (2e-3, 8, "dpo")
    assert settings["lora"] == {
        **json.loads(json.dumps(vars(LoraSettings(2, 4.0)))),
        "targets": ["q_proj"],
    }
    assert settings["rules"]["append_eos"] is True  # type: ignore[index]
    assert settings["formats"]["format"] == "trl"  # type: ignore[index]


def test_the_command_and_python_read_the_same_settings(
    run: Run, file: Path, tmp_path: Path
) -> None:
    assert run("train", "--config", file)[0] == 0
    again = TrainConfig.from_yaml(file)
    assert DPOTrainer(config=again, show_progress=False).finished


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("lorra: true", "run.yaml:11: unknown key lorra: did you mean lora?"),
        ("epochs: many", "run.yaml:11: epochs must be a whole number"),
        ("overwrite: true", "run.yaml:11: overwrite belongs to one call"),
    ],
)
def test_an_error_names_the_line_and_nothing_is_written(
    run: Run, file: Path, tmp_path: Path, line: str, reason: str
) -> None:
    with file.open("a") as opened:
        opened.write(line + "\n")
    code, _, err = run("train", "--config", file)
    assert code == 2
    assert reason in err
    assert not (tmp_path / "out").exists()


def test_what_is_in_neither_is_missing(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\n")
    code, _, err = run("train", "--config", file)
    assert code == 2
    assert "missing option '--model'" in err
    code, _, err = run("train", "--config", tmp_path / "none.yaml")
    assert (code, err) == (2, f"error: {tmp_path / 'none.yaml'}: no such file\n")


def test_precompute_and_evaluate_take_files(
    run: Run, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "precompute.yaml"
    file.write_text(f"model: {tiny_model}\ndata: [{pairs_file}]\ncache: {tmp_path / 'cache'}\n")
    code, out, err = run("precompute", "--config", file)
    assert code == 0, err
    assert "32 completions scored" in out
    file.write_text(
        f"policy: {tiny_model}\nreference: {tiny_model}\ndata: {pairs_file}\nbeta: 1\nsamples: 3\n"
    )
    code, out, err = run("evaluate", "--config", file, "--json", tmp_path / "e.json")
    assert code == 0, err
    result = json.loads((tmp_path / "e.json").read_text())
    assert (result["beta"], result["kl"]["samples"]) == (1.0, 3)


class TestRunFile:
    """Each run writes `run.yaml`, which repeats it."""

    def test_it_repeats_the_run(
        self, run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(file.parent)
        file.write_text(file.read_text().replace(str(tmp_path) + "/", ""))
        assert run("train", "--config", "run.yaml", "--seed", "3")[0] == 0
        recorded = tmp_path / "out" / "run.yaml"
        monkeypatch.chdir("/")
        code, out, _ = run("train", "--config", recorded)
        assert code == 0
        assert "already finished" in out
        assert run("train", "--config", recorded, "--output", tmp_path / "again")[0] == 0
        first, second = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again")
        )
        assert all(bool((first[name] == second[name]).all()) for name in first)
        assert len(first) == len(second) > 0
        assert settings_of(tmp_path / "again")["seed"] == 3
        code, _, err = run("train", "--config", recorded, "--lr", "1")
        assert code == 2
        assert "which differs in lr" in err
