"""A sweep shares its data and reference, continues where it stopped, and survives failed runs."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.json
import pytest
from conftest import Run, write_pairs
from safetensors.torch import load_file

from logratio.data import build_store
from logratio.errors import ConfigError, SettingTypeError
from logratio.extras import MissingExtraError
from logratio.training import (
    EvaluateConfig,
    RunInterruptedError,
    SweepConfig,
    SweepResult,
    TrainConfig,
    evaluate,
    evaluation,
    reference_scorer,
    sweep,
    sweep_runs,
    train,
)
from logratio.training import trainer as trainers
from logratio.training.metrics import MetricsLog
from logratio.training.run_folder import RunExistsError, locked_output
from logratio.training.sweep_runs import prepare, runs_of


def sweep_in(folder: Path, model: Path) -> SweepConfig:
    data, held_out = (
        write_pairs(folder / f"{name}.jsonl", count)
        for name, count in (("pairs", 16), ("held_out", 20))
    )
    base = TrainConfig(model, [data], folder / "swept", batch_size=8, save_every=1)
    return SweepConfig(base, [held_out], lr=(1e-3, 3e-3), samples=4, max_new_tokens=8)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> SweepConfig:
    return sweep_in(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """A finished sweep, which no test changes."""
    return run_sweep(sweep_in(tmp_path_factory.mktemp("finished"), tiny_model))


@pytest.fixture
def swept(config: SweepConfig, finished: SweepResult) -> SweepConfig:
    """The configuration of a sweep that is finished, in a folder of the test's own."""
    shutil.copytree(finished.output, config.base.output)
    return config


def with_(config: SweepConfig, base: dict[str, Any] | None = None, **changes: Any) -> SweepConfig:
    return dataclasses.replace(
        config, base=dataclasses.replace(config.base, **(base or {})), **changes
    )


def run_sweep(config: SweepConfig) -> SweepResult:
    return sweep(config, show_progress=False)


def lines(config: SweepConfig) -> list[dict[str, Any]]:
    text = (Path(config.base.output) / "sweep.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that were trained, in order."""
    names: list[str] = []
    inner = trainers.DPOTrainer.run_updates

    def counted(self: trainers.DPOTrainer) -> Any:
        names.append(Path(self.config.output).name)
        return inner(self)

    monkeypatch.setattr(trainers.DPOTrainer, "run_updates", counted)
    return names


def test_every_combination_has_a_run_with_a_readable_name(config: SweepConfig) -> None:
    grid = with_(config, loss=("dpo", "ipo"), beta=(0.1, 0.5), lr=(1e-6,), seed=(0, 1, 0))
    runs = runs_of(grid)
    names = [Path(run.output).name for run in runs]
    assert len(set(names)) == len(names) == 8
    assert names[0] == "dpo-beta0.1-lr1e-06-seed0"
    assert names[-1] == "ipo-beta0.5-lr1e-06-seed1"
    assert (runs[-1].loss, runs[-1].beta, runs[-1].lr, runs[-1].seed) == ("ipo", 0.5, 1e-6, 1)
    assert Path(runs_of(with_(config, loss=("simpo",)))[0].output).name.startswith("simpo-beta2.0")


def test_the_runs_equal_runs_and_evaluations_of_their_own(
    config: SweepConfig, finished: SweepResult, tmp_path: Path
) -> None:
    result = finished
    assert [row.name for row in result.rows] == [
        "dpo-beta0.1-lr0.001-seed0",
        "dpo-beta0.1-lr0.003-seed0",
    ]
    alone = dataclasses.replace(config.base, output=tmp_path / "alone", lr=3e-3)
    train(alone, show_progress=False)
    row = result.rows[1]
    mine, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (result.output / row.name, tmp_path / "alone")
    )
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-6
    found = evaluate(
        EvaluateConfig(
            result.output / row.name,
            config.base.model,
            config.eval_data,
            samples=4,
            max_new_tokens=8,
        ),
        show_progress=False,
    )
    assert found.kl is not None
    assert (row.accuracy, row.kl) == (found.accuracy, found.kl.nats)
    assert row.evaluation is not None
    assert row.evaluation["margin"] == found.margin
    assert result.best in result.rows
    card = (result.output / row.name / "README.md").read_text()
    low, high = row.accuracy_interval
    shown = f"{row.accuracy:.4g} (95 %: {low:.3f} to {high:.3f})"
    assert f"| preference accuracy | {shown} |" in card


def test_the_reference_scores_once_and_the_data_is_tokenized_once(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, scored = list[str](), list[int]()
    build, score = build_store, reference_scorer.ReferenceScorer.score

    def counted_build(data: Any, *arguments: Any, **options: Any) -> Any:
        built.append(Path(data[0]).name)
        return build(data, *arguments, **options)

    def counted_score(self: Any, groups: Any) -> Any:
        scored.append(len(groups))
        return score(self, groups)

    monkeypatch.setattr("logratio.training.dataset.build_store", counted_build)
    monkeypatch.setattr(reference_scorer.ReferenceScorer, "score", counted_score)
    monkeypatch.setattr(trainers, "build_reference", lambda *_: pytest.fail("a second model"))
    result = run_sweep(config)
    assert not [row.failed for row in result.rows if row.failed]
    assert built == ["held_out.jsonl", "pairs.jsonl"]
    assert scored == [16]


def test_a_finished_sweep_trains_and_evaluates_nothing(
    swept: SweepConfig,
    finished: SweepResult,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = lines(swept)
    assert len(before) == 2
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    again = run_sweep(swept)
    assert (again.rows, again.best, lines(swept)) == (finished.rows, finished.best, before)
    assert not trained


def test_more_samples_evaluate_again_without_training(
    swept: SweepConfig, trained: list[str]
) -> None:
    result = run_sweep(with_(swept, samples=6))
    assert not trained
    assert len(lines(swept)) == 4
    assert [row.evaluation["kl"]["samples"] for row in result.rows if row.evaluation] == [6, 6]


def test_more_values_add_runs(swept: SweepConfig, trained: list[str]) -> None:
    result = run_sweep(with_(swept, lr=(1e-3, 3e-3, 5e-3)))
    assert len(result.rows) == 3
    assert trained == [result.rows[2].name]


def test_an_interrupted_sweep_resumes_its_run(
    config: SweepConfig, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = MetricsLog.write

    def write(self: Any, step: int, *values: Any) -> None:
        inner(self, step, *values)
        if len(trained) == 2 and step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write)
        with pytest.raises(RunInterruptedError):
            run_sweep(config)
    assert [line["name"] for line in lines(config)] == ["dpo-beta0.1-lr0.001-seed0"]
    second = Path(config.base.output) / "dpo-beta0.1-lr0.003-seed0"
    assert any((second / "checkpoints").iterdir())
    result = run_sweep(config)
    assert trained[2:] == ["dpo-beta0.1-lr0.003-seed0"]
    assert not [row.failed for row in result.rows if row.failed]
    metrics = (second / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in metrics]
    assert steps == [1, 2]


def test_a_failed_run_is_recorded_and_the_sweep_continues(
    config: SweepConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = trainers.DPOTrainer.run_updates

    def fail(self: trainers.DPOTrainer) -> Any:
        if self.config.lr == 1e-3:
            raise RuntimeError("out of luck")
        return inner(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.DPOTrainer, "run_updates", fail)
        result = run_sweep(config)
    assert [row.failed for row in result.rows] == ["RuntimeError: out of luck", None]
    assert result.best == result.rows[1]
    assert result.ranked[-1] == result.rows[0]
    assert [row.failed for row in run_sweep(config).rows] == [None, None]
    assert [line["failed"] for line in lines(config)] == ["RuntimeError: out of luck", None, None]


def test_changed_settings_do_not_replace_finished_runs(swept: SweepConfig) -> None:
    result = run_sweep(with_(swept, {"batch_size": 4}))
    assert all("RunExistsError" in (row.failed or "") for row in result.rows)
    result = run_sweep(with_(swept, {"batch_size": 4, "overwrite": True}))
    assert [row.failed for row in result.rows] == [None, None]
    assert len(lines(swept)) == 2


def test_a_loss_without_a_reference_needs_no_cache(config: SweepConfig) -> None:
    result = run_sweep(with_(config, loss=("simpo",), lr=(1e-3,), samples=0))
    (row,) = result.rows
    assert row.failed is None
    assert row.kl != row.kl
    assert not (Path(config.base.output) / "cache").exists()


def test_tables_and_functions_are_data_too(config: SweepConfig, pairs_file: Path) -> None:
    table = pyarrow.json.read_json(pairs_file)
    result = run_sweep(with_(config, {"data": [table]}, lr=(1e-3,), samples=0))
    assert [row.failed for row in result.rows] == [None]
    assert "data" not in (Path(config.base.output) / "sweep.yaml").read_text().partition("model")[0]


def test_a_store_is_used_where_it_is(config: SweepConfig, run: Run, tmp_path: Path) -> None:
    store = tmp_path / "pairs.store"
    given = (config.base.data[0], "--tokenizer", config.base.model, "--output", store)
    assert run("data", "build", *given)[0] == 0
    result = run_sweep(with_(config, {"data": [store]}, lr=(1e-3,), samples=0))
    assert [row.failed for row in result.rows] == [None]
    assert not (Path(config.base.output) / "train.store").exists()


def test_a_second_sweep_in_the_folder_is_refused(config: SweepConfig) -> None:
    with locked_output(Path(config.base.output)), pytest.raises(RunExistsError, match="another"):
        run_sweep(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": ("sft",)}, "compares losses of pairs"),
        ({"loss": ("nope",)}, "'nope' is unknown"),
        ({"samples": -1}, "samples must be at least 0"),
        ({"samples": 1, "kl_budget": 1.0}, "set samples to 2 or more"),
        ({"kl_budget": 0.0}, "kl_budget must be above 0"),
        ({"workers": 2}, "give engine ray"),
        ({"workers": 0, "engine": "ray"}, "workers must be at least 1"),
        ({"beta": (0.1, -1.0)}, "beta must be above 0"),
        ({"lr": (0.0,)}, "lr must be above 0"),
        ({"base": {"label_smoothing": 0.1}, "loss": ("dpo", "ipo")}, "ipo has no label_smoothing"),
        ({"max_new_tokens": 600}, "lower max_new_tokens"),
        ({"base": {"best_metric": "loss"}}, "leave best_metric out"),
        ({"base": {"eval_share": 0.1}}, "leave eval_share out"),
    ],
)
def test_a_bad_setting_is_refused_before_any_training(
    config: SweepConfig, trained: list[str], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run_sweep(with_(config, changes.pop("base", None), **changes))
    assert not trained
    assert not list(Path(config.base.output).glob("dpo*"))


def test_other_kinds_of_settings_are_refused(config: SweepConfig) -> None:
    with pytest.raises(SettingTypeError, match="lr must be a list"):
        with_(config, lr=1e-3)
    with pytest.raises(SettingTypeError, match="expected a SweepConfig"):
        sweep(config.base)  # type: ignore[arg-type]


def test_ray_must_be_installed(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str) -> None:
        raise MissingExtraError(f"{module}: {extra}")

    monkeypatch.setattr(sweep_runs, "require", missing)
    with pytest.raises(MissingExtraError, match="ray"):
        prepare(with_(config, engine="ray"))


class TestCommand:
    """`logratio sweep`."""

    @pytest.fixture
    def file(self, config: SweepConfig, tmp_path: Path) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(
            f"model: {config.base.model}\ndata: {config.base.data[0]}\n"
            f"eval_data: {config.eval_data[0]}\noutput: {config.base.output}\n"
            "lr: [1e-3, 3e-3]\nloss_type: sigmoid\nbatch_size: 8\nlora: {r: 2}\n"
            "samples: 4\nmax_new_tokens: 8\n"
        )
        return path

    def test_a_file_flags_and_the_written_file(
        self, run: Run, file: Path, config: SweepConfig, tmp_path: Path
    ) -> None:
        code, out, err = run("sweep", "--config", file, "--lr", "2e-3", "--kl-budget", "50")
        assert code == 0, err
        assert "dpo-beta0.1-lr0.002-seed0 (the highest accuracy among runs" in out
        assert [line["name"] for line in lines(config)] == ["dpo-beta0.1-lr0.002-seed0"]
        folder = Path(config.base.output)
        assert (folder / "dpo-beta0.1-lr0.002-seed0" / "adapter_model.safetensors").exists()
        assert (folder / "sweep.svg").exists()
        code, out, err = run("sweep", "--config", folder / "sweep.yaml")
        assert code == 0, err
        assert len(lines(config)) == 1
        assert "at most 50 nats" in out
        again = SweepConfig.from_yaml(folder / "sweep.yaml")
        assert (again.lr, again.base.lora and again.base.lora.rank) == ((2e-3,), 2)

    def test_a_dry_run_lists_the_runs_and_writes_nothing(
        self, run: Run, file: Path, config: SweepConfig
    ) -> None:
        code, out, err = run("sweep", "--config", file, "--dry-run", "--seed", "0", "--seed", "1")
        assert code == 0, err
        assert len(out.splitlines()) == 4
        assert "4 runs with the reference pass, each evaluated on 20 pairs and 4 samples" in err
        assert not Path(config.base.output).exists()

    def test_a_failed_run_is_named_and_the_exit_code_is_1(
        self, run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: object) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(trainers.DPOTrainer, "run_updates", fail)
        code, out, _ = run("sweep", "--config", file)
        assert code == 1
        assert "dpo-beta0.1-lr0.001-seed0 failed: RuntimeError: out of luck" in out
        assert "chosen: none (no run has finished)" in out

    def test_the_file_has_its_own_errors(self, run: Run, file: Path) -> None:
        with file.open("a") as opened:
            opened.write("precompute: true\n")
        code, _, err = run("sweep", "--config", file)
        assert (code, "precompute cannot be set for this command" in err) == (2, True)


def test_settings_of_runs_are_keys_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: m\ntrain_dataset: d\neval_dataset: e\noutput: o\nbeta: 0.1\nseed: [0, 1]\n"
        "max_length: 9\nlora: true\nlora_rank: 4\nlearning_rate: 1e-5\nuse_peft: true\n"
    )
    with pytest.raises(ConfigError, match=r"sweep\.yaml:11: use_peft is already given in line 8"):
        SweepConfig.from_yaml(file)
    file.write_text(file.read_text().replace("use_peft: true\n", ""))
    config = SweepConfig.from_yaml(file)
    assert (config.beta, config.seed, config.lr) == ((0.1,), (0, 1), (1e-5,))
    assert (config.base.rules.max_length, config.base.lora and config.base.lora.rank) == (9, 4)
    file.write_text("base: {model: m, data: d, output: o, lr: [1]}\neval_data: e\n")
    with pytest.raises(ConfigError, match="the list lr is a key of the file itself"):
        SweepConfig.from_yaml(file)
    file.write_text(
        "base:\n  model: m\n  data: d\n  output: o\n  lr: 1e-4\neval_data: e\nbeta: 0.1, 0.5\n"
    )
    nested = SweepConfig.from_yaml(file)
    assert (nested.beta, nested.lr, nested.base.lr) == ((0.1, 0.5), (), 1e-4)
    file.write_text("model: m\n")
    with pytest.raises(ConfigError, match="data and output and eval_data must be given"):
        SweepConfig.from_yaml(file)
