"""Trackers get every row under the names that their dashboards know, and never delay a run."""

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import Run
from stop_after import stop_after

from logratio.errors import ConfigError, SettingTypeError
from logratio.training import RunInterruptedError, TrainConfig, TrainResult, trackers
from logratio.training.trackers import dashboard_names, plain_settings, trackers_of
from logratio.training.trainer import DPOTrainer


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    """Four updates; an evaluation after the last."""
    settings: dict[str, Any] = {
        "batch_size": 4,
        "save_every": 0,
        "eval_share": 0.01,
        "max_steps": 4,
    }
    return TrainConfig(tiny_model, [pairs_file], tmp_path / "out", **settings)


def with_(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def quiet(config: TrainConfig) -> TrainResult:
    return DPOTrainer(config=config, show_progress=False).train()


class Recorded:
    """The calls of a fake tracker's package."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __call__(self, name: str, given: Any = None) -> Any:
        self.calls.append((name, given))

    def of(self, name: str) -> list[Any]:
        return [given for called, given in self.calls if called == name]


def fake(name: str, recorded: Recorded, log: Callable[[Any], None] | None = None) -> ModuleType:
    """Return a module with the part of a tracker's interface that is used."""
    module: Any = ModuleType(name)
    log = log or (lambda row: recorded("log", row))
    run = SimpleNamespace(
        id="run-1",
        info=SimpleNamespace(run_id="run-1"),
        define_metric=lambda *given, **_: recorded("define", given),
        log=lambda row, **_: log(row),
        finish=lambda **given: recorded("finish", given),
    )

    def start(**given: Any) -> Any:
        recorded("start", given)
        return run

    module.run = None
    module.Table = lambda columns=None, data=None, dataframe=None: (
        (columns, data)
        if dataframe is None
        else ([*dataframe.columns], dataframe.to_numpy().tolist())
    )
    module.log_table = lambda data, file: log({**data, "file": file})
    module.init = module.start_run = start
    module.active_run = lambda: None
    module.set_experiment = lambda given: recorded("experiment", given)
    module.log_params = lambda given: recorded("params", given)
    module.log_metrics = lambda row, step: log({**row, "step": step})
    module.end_run = lambda given: recorded("finish", given)
    return module  # type: ignore[no-any-return]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorded]:
    """Install a fake package; return its calls."""

    def installed(name: str, log: Callable[[Any], None] | None = None) -> Recorded:
        recorded = Recorded()
        monkeypatch.setitem(sys.modules, name, fake(name, recorded, log))
        return recorded

    return installed


def rows_of(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_row_arrives_under_the_names_of_dashboards(
    config: TrainConfig, install: Callable[..., Recorded], name: str
) -> None:
    recorded = install(name)
    config = with_(config, report_to=name, run_name="first", project="mine")
    result = quiet(config)
    updates, evaluations = list[Any](), list[Any]()
    for row in recorded.of("log"):
        (evaluations if "eval/loss" in row else updates).append(row)
    assert [row["train/loss"] for row in updates] == [row["loss"] for row in rows_of(config)]
    assert [row["train/global_step"] for row in updates] == [1, 2, 3, 4]
    assert {"train/rewards/accuracies", "train/learning_rate", "train/epoch"} <= updates[0].keys()
    (evaluated,) = evaluations
    assert evaluated["eval/loss"] == result.evaluations[0]["eval_loss"]
    assert "eval/rewards/margins" in evaluated
    (started,) = recorded.of("start")
    assert started["project"] == "mine"
    assert started["name"].startswith("first")
    assert started["config"]["batch_size"] == 4
    assert recorded.calls[-1][0] == "finish"
    assert recorded.of("finish") in ([{"exit_code": 0}], [{}])


def test_mlflow_gets_the_names_that_transformers_sends_it(
    config: TrainConfig, install: Callable[..., Recorded]
) -> None:
    recorded = install("mlflow")
    quiet(with_(config, report_to=["mlflow"], project="mine"))
    rows = recorded.of("log")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]
    assert {"loss", "learning_rate", "rewards/margins"} <= rows[0].keys()
    assert "eval_rewards/margins" in rows[4]
    params = {name: value for part in recorded.of("params") for name, value in part.items()}
    assert params["batch_size"] == "4"
    assert params["rules.max_length"] == "1024"
    assert all(len(part) <= 100 for part in recorded.of("params"))
    assert recorded.of("experiment") == ["mine"]
    assert recorded.of("finish") == ["FINISHED"]


def samples_of(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_samples_arrive_as_a_table(
    config: TrainConfig, install: Callable[..., Recorded], name: str, loss: Any
) -> None:
    recorded = install(name)
    sampling = {"eval_samples": 2, "max_new_tokens": 4, "eval_every": 2}
    config = with_(config, loss=loss, report_to=name, **sampling)
    quiet(config)
    rows = [row for row in recorded.of("log") if "eval/samples" in row]
    assert [row["train/global_step"] for row in rows] == [2, 4]
    names = ["prompt", "policy", "reference"][: 3 if loss == "dpo" else 2]
    sampled = [[one[name] for name in names] for one in samples_of(config)]
    assert [row["eval/samples"] for row in rows] == [(names, sampled[:2]), (names, sampled[2:])]


def test_mlflow_gets_one_table_of_all_samples(
    config: TrainConfig, install: Callable[..., Recorded]
) -> None:
    recorded = install("mlflow")
    config = with_(config, report_to="mlflow", eval_samples=2, max_new_tokens=4, eval_every=2)
    quiet(config)
    tables = [row for row in recorded.of("log") if "file" in row]
    assert [(row["file"], row["step"]) for row in tables] == [
        ("samples.json", [2, 2]),
        ("samples.json", [4, 4]),
    ]
    found = [text for row in tables for text in row["reference"]]
    assert found == [one["reference"] for one in samples_of(config)]


def test_tensorboard_gets_samples_as_a_text(config: TrainConfig) -> None:
    from tensorboardX.proto.event_pb2 import Event

    quiet(with_(config, eval_samples=1, max_new_tokens=4))
    (path,) = (Path(config.output) / "tensorboard").iterdir()
    data, texts = path.read_bytes(), list[Any]()
    while data:
        size = int.from_bytes(data[:8], "little")
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        texts += [(event.step, v) for v in event.summary.value if v.HasField("tensor")]
    ((step, value),) = texts
    (sample,) = samples_of(config)
    assert (step, value.tag) == (4, "eval/samples/text_summary")
    assert value.metadata.plugin_data.plugin_name == "text"
    header, _, row = value.tensor.string_val[0].decode().splitlines()
    assert header == "| prompt | policy | reference |"
    assert row == f"| {sample['prompt']} | {sample['policy']} | {sample['reference']} |"


def test_a_table_that_is_refused_costs_no_metrics(
    config: TrainConfig, install: Callable[..., Recorded], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = install("wandb")
    sys.modules["wandb"].Table = None  # type: ignore[attr-defined]
    quiet(with_(config, report_to="wandb", eval_samples=1, max_new_tokens=4, eval_every=2))
    assert sum("eval/loss" in row for row in recorded.of("log")) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert len(said) == 1
    assert said[0].startswith("wandb gets no samples (TypeError: ")


def test_names_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import rewrite_logs

    ours = {"loss": 1.0, "lr": 2.0, "rewards/chosen": 3.0, "eval_loss": 4.0}
    theirs = {"loss": 1.0, "learning_rate": 2.0, "rewards/chosen": 3.0, "eval_loss": 4.0}
    assert dashboard_names(ours) == rewrite_logs(theirs)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_resumed_run_continues_the_trackers_run(
    config: TrainConfig, install: Callable[..., Recorded], name: str
) -> None:
    recorded = install(name)
    config = with_(config, report_to=name)
    with stop_after(2), pytest.raises(RunInterruptedError):
        quiet(config)
    quiet(with_(config, resume=True))
    first, second = recorded.of("start")
    key = {"wandb": "id", "trackio": "name", "mlflow": "run_id"}[name]
    kept = json.loads((Path(config.output) / "trackers.json").read_text())[name]
    assert second[key] == kept
    assert first.get(key) in (None, kept)
    assert len(recorded.of("params")) <= 1, "a parameter cannot be changed"
    assert str(recorded.of("finish")[0]) in ("{'exit_code': 1}", "{}", "FAILED")


def test_a_run_that_the_process_has_started_is_used_and_left_open(
    config: TrainConfig, install: Callable[..., Recorded]
) -> None:
    recorded = install("wandb")
    wandb: Any = sys.modules["wandb"]
    wandb.run = wandb.init()
    wandb.run.config = SimpleNamespace(update=lambda given, **_: recorded("config", given))
    quiet(with_(config, report_to="wandb"))
    assert len(recorded.of("start")) == 1
    assert len(recorded.of("log")) == 5
    assert recorded.of("config")[0]["max_steps"] == 4
    assert not recorded.of("finish")


def test_a_tracker_that_blocks_for_ever_delays_nothing(
    config: TrainConfig,
    install: Callable[..., Recorded],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a queue of two rows: the others are dropped, which is said once."""
    never = threading.Event()
    install("wandb", lambda _: never.wait() and None)
    monkeypatch.setattr(trackers, "ROWS", 2)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    try:
        assert len(quiet(with_(config, report_to="wandb", max_steps=12)).history) == 12
        said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    finally:
        never.set()
    assert [line.partition(";")[0] for line in said] == [
        "wandb does not keep up: rows are dropped there",
        said[1].partition(";")[0],
    ]
    assert "did not answer within 0.2 s" in said[1]
    assert len(rows_of(config)) == 12


def test_several_blocked_trackers_share_one_wait(
    config: TrainConfig, install: Callable[..., Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    for name in ("wandb", "mlflow", "trackio"):
        install(name, lambda _: never.wait() and None)
    monkeypatch.setattr(trackers, "PATIENCE", 0.5)
    reporters = trackers.reporters_of(
        with_(config, report_to=["wandb", "mlflow", "trackio"]), plain_settings(config)
    )
    for one in reporters:
        one.send(1, {"loss": 1.0})
    start = time.monotonic()
    trackers.close_all(reporters, failed=False)
    taken = time.monotonic() - start
    never.set()
    assert 0.4 < taken < 1.4


@pytest.mark.parametrize("error", [RuntimeError("no network\nmore"), SystemExit(1)])
def test_a_tracker_that_fails_is_a_sentence(
    config: TrainConfig,
    install: Callable[..., Recorded],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    def fails(_: Any) -> None:
        raise error

    install("wandb", fails)
    assert len(quiet(with_(config, report_to="wandb")).history) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert said == [f"wandb failed ({reason}); the run continues, metrics.jsonl has all metrics"]


def test_no_tracker_is_imported_unless_asked(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlflow", "trackio"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(trackers_of("all")) >= {"mlflow", "trackio"}
    quiet(config)
    assert not {"mlflow", "trackio"} & sys.modules.keys()


class TestSettings:
    def test_a_missing_package_is_an_error_that_names_it(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ConfigError, match="pip install wandb"):
            DPOTrainer(config=with_(config, report_to="wandb"))

    def test_a_folder_of_the_name_is_not_the_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wandb and mlflow write such folders."""
        (tmp_path / "trackio").mkdir()
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "trackio", raising=False)
        if not trackers._is_installed("trackio"):
            with pytest.raises(ConfigError, match="its package is missing"):
                trackers_of("trackio")

    def test_an_unknown_name_lists_the_known_ones(self, config: TrainConfig) -> None:
        known = "choose from tensorboard, wandb, mlflow, trackio, or give none or all alone"
        for name, why in (
            ("neptune", f"this tracker is not supported: {known}; a callback can send"),
            ("wandbb", f"unknown tracker: did you mean wandb. Otherwise {known}"),
            ("nothing", f"unknown tracker: {known}"),
        ):
            with pytest.raises(ConfigError, match=f"report_to {name}: {why}"):
                DPOTrainer(config=with_(config, report_to=name))
        with pytest.raises(SettingTypeError, match="report_to: give the names of trackers"):
            with_(config, report_to=3)

    def test_none_and_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("wandb", "mlflow", "trackio"):
            monkeypatch.setitem(sys.modules, name, None)
        assert trackers_of("none") == trackers_of([]) == ()
        assert trackers_of("all") == trackers_of(None) == ("tensorboard",)

    @pytest.mark.parametrize("given", [["none", "tensorboard"], "tensorboard, none"])
    def test_none_with_a_tracker_is_refused(self, given: Any) -> None:
        with pytest.raises(ConfigError, match="it means no tracker: give none alone, or only tens"):
            trackers_of(given)
        with pytest.raises(ConfigError, match="every tracker that is installed: give all alone"):
            trackers_of(["tensorboard", "all"])

    def test_names_with_commas_are_several(self) -> None:
        assert trackers_of("tensorboard, tensorboard") == ("tensorboard",)
        with pytest.raises(ConfigError, match="report_to nope:"):
            trackers_of("tensorboard,nope")

    def test_without_tensorboard_there_are_no_events(self, config: TrainConfig) -> None:
        quiet(with_(config, report_to="none"))
        assert not (Path(config.output) / "tensorboard").exists()
        assert len(rows_of(config)) == 4

    def test_the_flag_takes_several(
        self, run: Run, config: TrainConfig, install: Callable[..., Recorded]
    ) -> None:
        recorded = {name: install(name) for name in ("wandb", "trackio")}
        (data,) = config.data
        given = ("--model", config.model, "--data", data, "--output", config.output)
        code, _, err = run("train", *given, "--report-to", "wandb", "trackio", "--max-steps", 2)
        assert code == 0, err
        assert [len(one.of("log")) for one in recorded.values()] == [2, 2]

    def test_settings_are_plain_and_tables_are_named_only(self, config: TrainConfig) -> None:
        import pyarrow

        table = pyarrow.table({"prompt": ["secret"]})
        found: Mapping[str, Any] = plain_settings(with_(config, data=table))
        assert found["data"] == ["a Table"]
        assert found["rules"]["max_length"] == 1024
        assert "secret" not in json.dumps(found)
