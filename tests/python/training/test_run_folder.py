"""A run's folder: replacing and keeping runs, locking, and full disks."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cache_folders import disk_of_128_kib
from conftest import Run, write_pairs
from safetensors.torch import load_file, save_file
from stop_after import stop_after

from logratio.durable import locked
from logratio.errors import ConfigError
from logratio.report.run_files import INFO_FILE
from logratio.training import (
    Callback,
    EvaluateConfig,
    LoraSettings,
    RunState,
    StaleCacheError,
    TrainConfig,
    checkpoint_folder,
    evaluate,
    train,
)
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.checkpoint_folder import SaveError
from logratio.training.metrics import MetricsLog, NonFiniteError
from logratio.training.run_folder import RunExistsError, locked_output, reward_beta
from logratio.training.trainer import DPOTrainer


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", lr=1e-3, batch_size=8, epochs=1, save_every=0
    )


def with_(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def quiet(config: TrainConfig) -> list[dict[str, float]]:
    return train(config, show_progress=False).history


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its inode and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in files}


def command(config: TrainConfig, *more: object) -> tuple[object, ...]:
    return (
        *("train", "--model", config.model, "--data", *config.data, "--output", config.output),
        *("--lr", config.lr, "--batch-size", config.batch_size, *more),
    )


class TestFinished:
    """A finished run is returned, or replaced on request, and never silently."""

    @pytest.mark.parametrize("more", [(), ("--resume",), ("--dry-run",)])
    def test_the_same_settings_end_at_once(
        self, run: Run, config: TrainConfig, more: tuple[str, ...]
    ) -> None:
        first = quiet(config)
        before = state(Path(config.output))
        code, out, err = run(*command(config, *more))
        assert code == 0, err
        assert out.splitlines()[-1].startswith("already finished: 2 updates")
        assert f"loss {first[-1]['loss']:.4f}" in out
        assert state(Path(config.output)) == before
        assert quiet(with_(config, resume=bool(more))) == first

    @pytest.mark.parametrize(
        ("changes", "names"),
        [
            ({"lr": 2e-3}, r"lr \(0.001 before, 0.002 now\)"),
            (
                {"loss": "ipo", "seed": 3},
                r'loss \("dpo" before, "ipo" now\), seed \(0 before, 3 now\)',
            ),
            ({"beta": 0.3, "resume": True}, r"beta \(0.1 before, 0.3 now\)"),
            ({"lora": LoraSettings(rank=2, targets=("q_proj",))}, "lora"),
            ({"data": ["OTHER"]}, "data"),
            ({"token_budget": 64}, r"token_budget \(2048 before, 64 now\)"),
        ],
    )
    def test_other_settings_need_overwrite(
        self, config: TrainConfig, tmp_path: Path, changes: dict[str, object], names: str
    ) -> None:
        quiet(config)
        if "data" in changes:
            other = write_pairs(tmp_path / "other.jsonl", 9)
            bad = {"prompt": "a", "chosen": "", "rejected": "b"}
            other.write_text(other.read_text() + json.dumps(bad) + "\n")
            changes = {"data": [other]}
        before = state(Path(config.output))
        with pytest.raises(RunExistsError, match=rf"differs in {names}: .*overwrite=True"):
            quiet(with_(config, **changes))
        assert state(Path(config.output)) == before

    def test_the_same_adapters_and_mixture_are_the_same_run(
        self, config: TrainConfig, tmp_path: Path
    ) -> None:
        """Tuples come back from JSON as lists."""
        mixed = with_(
            config,
            lora=LoraSettings(rank=2, targets=("q_proj", "v_proj")),
            data=[*config.data, write_pairs(tmp_path / "more.jsonl", 25)],
            mix=(0.5, 0.5),
        )
        assert not train(mixed, show_progress=False).was_finished
        assert train(mixed, show_progress=False).was_finished

    def test_overwrite_replaces_it_and_keeps_the_old_model_until_then(
        self, run: Run, config: TrainConfig
    ) -> None:
        quiet(config)
        output = Path(config.output)
        old = (output / "model.safetensors").read_bytes()
        with pytest.raises(NonFiniteError):
            quiet(with_(config, lr=1e30, max_grad_norm=1e30, warmup=0.0, overwrite=True))
        assert (output / "model.safetensors").read_bytes() == old
        code, _, err = run(*command(with_(config, lr=2e-3), "--overwrite"))
        assert code == 0, err
        assert (output / "model.safetensors").read_bytes() != old
        assert json.loads((output / "training.json").read_text())["lr"] == 2e-3
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 2

    def test_resume_and_overwrite_contradict_each_other(
        self, run: Run, config: TrainConfig
    ) -> None:
        code, _, err = run(*command(config, "--resume", "--overwrite"))
        assert code == 2
        assert "give one of them" in err

    def test_a_run_of_an_older_version_is_not_replaced_either(self, config: TrainConfig) -> None:
        quiet(config)
        path = Path(config.output) / "training.json"
        settings = json.loads(path.read_text())
        del settings["identity"]
        path.write_text(json.dumps(settings))
        with pytest.raises(RunExistsError, match="did not record"):
            quiet(config)

    def test_damaged_settings_are_named(self, config: TrainConfig) -> None:
        quiet(config)
        (Path(config.output) / "training.json").write_text("{")
        with pytest.raises(ConfigError, match=r"training\.json is not JSON"):
            quiet(config)

    def test_a_model_that_no_run_made_stays_even_with_overwrite(
        self, config: TrainConfig, make_model: Callable[..., Path]
    ) -> None:
        with pytest.raises(ConfigError, match="logratio did not train"):
            quiet(with_(config, output=make_model("precious"), overwrite=True))


class TestOneAtATime:
    """Two processes never train into one folder."""

    def test_a_second_process_is_refused(self, run: Run, config: TrainConfig) -> None:
        Path(config.output).mkdir()
        with locked(Path(config.output)):
            code, _, err = run(*command(config))
            assert code == 2
            assert "another process is training into this folder" in err
            assert run(*command(config, "--dry-run"))[0] == 0
        assert run(*command(config))[0] == 0

    def test_a_new_folder_without_files_is_removed_again(self, tmp_path: Path) -> None:
        for name in ("new", "deep/er"):
            with pytest.raises(ConfigError), locked_output(tmp_path / name):
                raise ConfigError("refused")
            assert not (tmp_path / name).exists()
        (tmp_path / "old").mkdir()
        with locked_output(tmp_path / "old"):
            pass
        assert (tmp_path / "old").is_dir()
        with locked_output(tmp_path / "used") as folder:
            (folder / "file").touch()
        assert (tmp_path / "used" / "file").is_file()

    def test_the_lock_is_held_from_the_start_to_the_end(self, config: TrainConfig) -> None:
        ready = DPOTrainer(config=config, show_progress=False)
        with pytest.raises(BlockingIOError), locked(Path(config.output)):
            pass
        ready.train()
        with locked(Path(config.output)):
            pass
        assert train(config, show_progress=False).was_finished

    def test_a_cell_of_a_notebook_can_run_again(self, config: TrainConfig) -> None:
        """A trainer that has not begun gives its folder to a newer one, in the same process."""
        older = DPOTrainer(config=with_(config, lr=2e-3), show_progress=False)
        newer = DPOTrainer(config=config, show_progress=False)
        with pytest.raises(RunExistsError, match="a newer one of this process has its folder"):
            older.train()
        with pytest.raises(BlockingIOError), locked(Path(config.output)):
            pass
        assert newer.train().steps == 2

    def test_a_run_in_progress_keeps_its_folder(self, config: TrainConfig) -> None:
        class Second(Callback):
            def on_start(self, state: RunState) -> None:
                with pytest.raises(RunExistsError, match="another process"):
                    DPOTrainer(config=config, show_progress=False)

        DPOTrainer(config=config, callbacks=[Second()], show_progress=False).train()

    def test_a_failed_start_leaves_no_lock(self, config: TrainConfig) -> None:
        Path(config.output).mkdir()
        bad = with_(config, cache=Path(config.output) / "cache")
        with pytest.raises(StaleCacheError):
            DPOTrainer(config=bad, show_progress=False)
        with locked(Path(config.output)):
            pass

    def test_torchrun_with_two_processes_is_refused(
        self, run: Run, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        policy = ("--policy", config.model, "--reference", config.model, "--beta", 0.1)
        given = (*policy, "--output", config.output)
        code, _, err = run("export", *given)
        assert code == 2
        assert "export runs in one process, and torchrun started 2" in err
        assert not Path(config.output).exists()
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("RANK", "0")
        assert run("export", *given, "--dry-run")[0] == 0


class TestFullDisk:
    """Metrics never stop a run; a failed save keeps earlier files and ends with a clear error."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        with disk_of_128_kib(tmp_path) as place:
            yield place

    def test_a_run_ends_in_time_and_leaves_the_last_model(
        self, tiny_model: Path, pairs_file: Path, disk: Path
    ) -> None:
        """A child, so that a hang ends this test and not the session."""
        out = disk / "out"
        config = TrainConfig(tiny_model, [pairs_file], out, batch_size=1, epochs=2)
        quiet(with_(config, batch_size=16, epochs=1, lora=LoraSettings(rank=1)))
        files = {p for p in out.iterdir() if p.suffix in (".safetensors", ".json")}
        kept = {p: p.read_bytes() for p in files - {out / INFO_FILE}}  # that of the new run
        arguments = [*map(str, command(config, "--epochs", 2, "--overwrite"))]
        code = FILLS_THE_DISK.format(filler=str(disk / "filler"), arguments=arguments)
        ended = subprocess.run(
            [sys.executable, "-c", code], timeout=90, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("cannot be written (No space left on device)") == 1
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
        assert "the model could not be saved" in line
        assert "--resume" in line or "no earlier checkpoint exists" in line
        assert "Traceback" not in ended.stderr
        assert {path: path.read_bytes() for path in kept} == kept
        assert not (out / ".saving").exists()

    def test_metrics_are_complete_once_the_disk_has_space(
        self, disk: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        filler = disk / "filler"
        with MetricsLog(disk, 0) as log:
            log.write(1, {"loss": 1.0})
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(b"x" * 512)
            for step in range(2, 400):
                log.write(step, {"loss": 1.0 / step, "x": 0.123456789})
            assert log._rows.waiting
            filler.unlink()
            log.write(400, {"loss": 0.0})
        rows = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [*range(1, 401)]
        assert capsys.readouterr().err.count("cannot be written") == 1
        assert events(disk / "tensorboard")[-1] == (400, "train/loss", 0.0)

    def test_what_is_missing_in_the_end_is_reported(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "tensorboard").write_text("a file where the folder would be")
        with MetricsLog(tmp_path, 0) as log:
            log.write(1, {"loss": 1.0})
        err = capsys.readouterr().err
        assert err.count("cannot be written") == 1
        assert "the last 3 records are missing" in err
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1

    def test_a_failed_checkpoint_leaves_the_one_before(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint_folder, "save_file", fails_from(3, save_file))
        with pytest.raises(SaveError, match=r"update 2 .*checkpoint-00000001 is complete") as ended:
            quiet(with_(config, batch_size=4, save_every=1))
        assert "No space left on device" in str(ended.value)
        monkeypatch.undo()
        assert len(quiet(with_(config, batch_size=4, save_every=1, resume=True))) == 3

    def test_a_model_that_cannot_be_saved_is_kept_as_a_checkpoint(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quiet(with_(config, output=tmp_path / "straight"))
        from transformers import PreTrainedModel

        real = PreTrainedModel.save_pretrained
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails_from(0, real))
        with pytest.raises(SaveError, match=r"checkpoint-00000002 holds the trained weights"):
            quiet(config)
        monkeypatch.undo()
        assert quiet(with_(config, resume=True)) == []
        one, other = (
            load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert train(config, show_progress=False).was_finished

    def test_standard_error_on_a_full_disk_stops_nothing(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = Path("/dev/full").open("w")  # noqa: SIM115 - to close it fails
        monkeypatch.setattr(sys, "stderr", full)
        monkeypatch.setattr("logratio.progress.LINE_EVERY", 0.0)
        result = train(config)
        with pytest.raises(OSError, match="No space"):
            full.close()
        assert result.steps == 2


FILLS_THE_DISK = """
from logratio.cli.app import main
import logratio.training.trainer as module
from logratio.training.trainer import DPOTrainer

module.check_writable = lambda *_: None  # it would refuse so small a disk before the run
real = DPOTrainer.run_updates

def run(trainer):
    with open({filler!r}, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
    return real(trainer)

DPOTrainer.run_updates = run
main({arguments!r})
"""
"""Another process fills the disk once the updates begin."""


def fails_from(count: int, real: Callable[..., object]) -> Callable[..., object]:
    """Return a function that finds the disk full after `count` calls, as safetensors says it."""
    calls = iter(range(10**6))

    def act(*given: object, **named: object) -> object:
        if next(calls) >= count:
            raise RuntimeError("Error while serializing: No space left on device (os error 28)")
        return real(*given, **named)

    return act


FAULTS = (
    ModuleNotFoundError("No module named 'tensorboardX'"),
    TypeError("Descriptors cannot be created directly.\nMore"),  # made for another protobuf
)


@pytest.mark.parametrize("error", FAULTS, ids=type)
def test_a_missing_tracker_is_a_note(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """metrics.jsonl contains everything, and the run continues."""

    class Failing:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith("tensorboardX"):
                raise error

    for name in [name for name in sys.modules if name.startswith("tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Failing(), *sys.meta_path])
    with MetricsLog(tmp_path, 0) as log:
        for step in (1, 2):
            log.write(step, {"loss": 0.5})
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()
    (said,) = capsys.readouterr().err.splitlines()
    reason = str(error).splitlines()[0]
    assert said == f"no TensorBoard events ({reason}); metrics.jsonl contains all metrics"


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Read TensorBoard's files with the framing that they have."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


class TestBeta:
    """β comes from the policy's training; another one is reported."""

    def test_it_is_that_of_the_run(self, run: Run, config: TrainConfig, tmp_path: Path) -> None:
        quiet(with_(config, beta=0.3))
        given = ("--policy", config.output, "--reference", config.model)
        result = tmp_path / "r.json"
        code, _, err = run("evaluate", *given, "--data", *config.data, "--json", result)
        assert (code, json.loads(result.read_text())["beta"]) == (0, 0.3)
        assert "was trained with" not in err
        for name, rest in (("evaluate", ("--data", *config.data)), ("export", OUTPUT(tmp_path))):
            code, _, err = run(name, *given, *rest, "--beta", "0.5", "--dry-run")
            assert code == 0, err
            assert "using beta 0.5; the policy was trained with 0.3" in err
        assert reward_beta(config.output, None) == 0.3

    def test_an_unfinished_run_beside_the_model_is_named(
        self, run: Run, config: TrainConfig, tmp_path: Path
    ) -> None:
        """The model is still that of the run before."""
        quiet(config)
        with pytest.raises(RunInterruptedError), stop_after(1):
            quiet(with_(config, overwrite=True, lr=2e-3))
        given = ("--policy", config.output, "--reference", config.model, "--dry-run")
        for name, rest in (("evaluate", ("--data", *config.data)), ("export", OUTPUT(tmp_path))):
            code, _, err = run(name, *given, *rest)
            assert code == 0, err
            assert "contains checkpoint-00000001 of a run that has not finished" in err

    def test_without_a_run_it_must_be_given(
        self, run: Run, config: TrainConfig, tmp_path: Path
    ) -> None:
        given = ("--policy", config.model, "--reference", config.model)
        for name, rest in (("evaluate", ("--data", *config.data)), ("export", OUTPUT(tmp_path))):
            code, _, err = run(name, *given, *rest)
            assert code == 2
            assert "give --beta, the reward per nat of log-ratio" in err

    @pytest.mark.parametrize("loss", ["sft", "simpo"])
    def test_a_loss_without_a_reference_has_none(self, config: TrainConfig, loss: str) -> None:
        quiet(with_(config, loss=loss))
        with pytest.raises(ConfigError, match="a loss without a reference: give beta"):
            evaluate(EvaluateConfig(config.output, config.model, config.data))
        assert reward_beta(config.output, 0.2) == 0.2


def OUTPUT(tmp_path: Path) -> tuple[object, ...]:  # noqa: N802
    return ("--output", tmp_path / "bundle")


class TestFolders:
    """Every command that loads a folder interprets it in the same way."""

    def test_a_model_with_an_adapter_in_it_is_refused_everywhere(
        self, run: Run, config: TrainConfig, tmp_path: Path
    ) -> None:
        lora = with_(config, lora=LoraSettings(rank=2), output=tmp_path / "adapter")
        quiet(lora)
        folder = tmp_path / "both"
        subprocess.run(["cp", "-r", str(config.model), str(folder)], check=True)
        for path in (tmp_path / "adapter").glob("adapter_*"):
            (folder / path.name).write_bytes(path.read_bytes())
        rest = ("--data", *config.data)
        pair = ("--policy", config.model, "--reference", folder, "--beta", 0.1)
        commands = [
            ("train", "--model", folder, *rest, "--output", tmp_path / "o"),
            ("train", "--model", config.model, "--reference", folder, *rest, *OUTPUT(tmp_path)),
            ("precompute", "--model", folder, *rest, "--cache", tmp_path / "cache"),
            ("evaluate", *pair, *rest),
            ("export", *pair, *OUTPUT(tmp_path)),
        ]
        for given in commands:
            code, _, err = run(*given)
            assert code == 2
            assert "contains both a full model (model.safetensors) and an adapter" in err
        (folder / "adapter_config.json").unlink()
        assert run(*commands[0], "--dry-run")[0] == 0

    def test_an_adapter_with_a_config_beside_it_is_an_adapter(
        self, run: Run, config: TrainConfig, tmp_path: Path
    ) -> None:
        quiet(with_(config, lora=LoraSettings(rank=2)))
        settings = (Path(config.model) / "config.json").read_text()
        (Path(config.output) / "config.json").write_text(settings)
        given = ("--policy", config.output, "--reference", config.model, "--dry-run")
        assert run("evaluate", *given, "--data", *config.data)[0] == 0

    @pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
    def test_files_have_the_mode_that_the_umask_allows(
        self, config: TrainConfig, umask: int
    ) -> None:
        before = os.umask(umask)
        try:
            quiet(config)
            quiet(with_(config, lora=LoraSettings(rank=2), overwrite=True))
        finally:
            os.umask(before)
        files = [path for path in Path(config.output).rglob("*") if path.is_file()]
        assert len(files) > 5
        assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}

    def test_so_have_stores_caches_and_reports(
        self, run: Run, config: TrainConfig, tmp_path: Path
    ) -> None:
        pairs = Path(str(config.data[0]))
        pairs.write_text(pairs.read_text() + '{"prompt": "a", "chosen": "", "rejected": "b"}\n')
        made = tmp_path / "made"
        before = os.umask(0o027)
        try:
            tokenizer = ("--tokenizer", config.model)
            assert run("data", "build", pairs, *tokenizer, "--output", made / "p.store")[0] == 0
            given = ("--model", config.model, "--data", pairs, "--cache", made / "cache")
            assert run("precompute", *given)[0] == 0
            assert run("cache", "export", made / "cache", made / "l.parquet")[0] == 0
            pair = ("--policy", config.model, "--reference", config.model, "--beta", 1)
            result = ("--json", made / "deep" / "e.json")
            assert run("evaluate", *pair, "--data", pairs, *result)[0] == 0
            report = ("--json", made / "r.json", "--picture", made / "r.svg")
            assert run("data", "report", pairs, *tokenizer, *report)[0] == 0
        finally:
            os.umask(before)
        files = [path for path in made.rglob("*") if path.is_file()]
        assert len(files) >= 8
        modes = {path.name: path.stat().st_mode & 0o777 for path in files}
        assert set(modes.values()) <= {0o640, 0o440}, modes

    def test_a_store_that_is_there_stays_until_it_may_go(
        self, run: Run, config: TrainConfig, tmp_path: Path
    ) -> None:
        store = tmp_path / "p.store"
        given = ("data", "build", *config.data, "--tokenizer", config.model, "--output", store)
        assert run(*given)[0] == 0
        before = store.read_bytes()
        few = write_pairs(tmp_path / "few.jsonl", 3)
        other = ("data", "build", few, *given[3:])
        code, _, err = run(*other)
        assert code == 2
        assert "--overwrite" in err
        assert store.read_bytes() == before
        assert run(*other, "--overwrite")[0] == 0
        assert store.read_bytes() != before

    @pytest.mark.parametrize("more", [(), ("--lora-target", "q_proj")])
    def test_an_adapter_for_a_layer_that_is_not_there(
        self, run: Run, config: TrainConfig, more: tuple[str, ...]
    ) -> None:
        given = command(config, "--lora", "--lora-target", "nonsense", *more, "--dry-run")
        code, _, err = run(*given)
        assert code == 2
        assert "--lora-target 'nonsense' matches no layer of" in err
        assert "k_proj" in err
        assert "Traceback" not in err

    def test_a_rate_that_is_too_high_is_named_as_the_cause(
        self, run: Run, config: TrainConfig
    ) -> None:
        wild = with_(config, lr=1e30)
        code, _, err = run(*command(wild, "--max-grad-norm", "1e30", "--warmup", "0"))
        assert code == 2
        assert "a learning rate that is too high, so try --lr 1e+29" in err
        assert "gradient norms" in err
