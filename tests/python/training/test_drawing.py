"""A run writes its report in another process, which can neither stop nor delay it."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from logratio.training import Callback, CallbackError, RunState, TrainConfig, drawing
from logratio.training.drawing import OFF, Drawing
from logratio.training.trainer import DPOTrainer


@pytest.fixture(autouse=True)
def reports_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OFF)


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    settings: dict[str, Any] = {"batch_size": 4, "save_every": 0, "eval_share": 0.2}
    return TrainConfig(tiny_model, [pairs_file], tmp_path / "out", **settings)


def wait_for(path: Path, seconds: float = 60.0) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return path.read_text()


def shown_by(code: str, monkeypatch: pytest.MonkeyPatch, output: Path) -> Drawing:
    """Return a drawing whose process runs `code` instead."""
    monkeypatch.setattr(drawing, "_CODE", code)
    return Drawing(output, wanted=True)


def test_a_run_has_its_report_at_the_end(config: TrainConfig) -> None:
    result = DPOTrainer(config=config, show_progress=False).train()
    page = (Path(config.output) / "report.html").read_text()
    assert f"Finished after {result.steps} updates" in page
    assert page.count("data:image/svg+xml") == 2
    assert "Distributions in the last evaluation" in page


@pytest.mark.parametrize("off", ["setting", "environment"])
def test_it_can_be_turned_off(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    if off == "environment":
        monkeypatch.setenv(OFF, "1")
    else:
        config = dataclasses.replace(config, report=False)
    DPOTrainer(config=config, show_progress=False).train()
    assert not (Path(config.output) / "report.html").exists()


def test_a_run_that_fails_leaves_a_report(config: TrainConfig) -> None:
    class Fails(Callback):
        def on_update(self, state: RunState, metrics: Mapping[str, float]) -> None:
            raise RuntimeError

    trainer = DPOTrainer(config=config, callbacks=[Fails()], show_progress=False)
    with pytest.raises(CallbackError):
        trainer.train()
    page = wait_for(Path(config.output) / "report.html")
    assert f"Not finished: 1 of {trainer.updates} updates" in page
    for process in drawing._abandoned:
        process.wait()


def test_a_process_that_hangs_delays_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing, "PATIENCE", 0.3)
    monkeypatch.setattr(drawing, "EVERY", 0.0)
    one = shown_by("import time; time.sleep(60)", monkeypatch, tmp_path)
    start = time.monotonic()
    one.request()
    process = one._process
    assert process is not None
    one.request()
    assert one._process is process, "one process at a time"
    one.finish()
    assert time.monotonic() - start < 5.0
    assert "is still being written" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_failure_is_a_sentence_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing, "EVERY", 0.0)
    one = shown_by("raise SystemExit('out of ink')", monkeypatch, tmp_path)
    for _ in range(3):
        one.request()
        assert one._process is not None
        one._process.wait()
    one.finish()
    said = capsys.readouterr().err
    assert said == "report.html could not be written (out of ink); the run is not affected\n"


def test_it_is_not_drawn_again_within_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in the first one: short runs draw at their end only."""
    one = shown_by("", monkeypatch, tmp_path)
    one.request()
    assert one._process is None
    one._started -= drawing.EVERY
    one.request()
    first = one._process
    assert first is not None
    first.wait()
    one.request()
    assert one._process is first
    one.finish()
    assert one._process is None


def test_no_process_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    one = Drawing(tmp_path, wanted=True)
    one.request()
    one.finish()
    assert capsys.readouterr().err.count("no process can be started") == 1


def test_a_machine_without_matplotlib_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing, "can_draw", lambda: False)
    Drawing(tmp_path, wanted=True).announce()
    assert "tables only: pip install 'logratio[plots]'" in capsys.readouterr().err
    Drawing(tmp_path, wanted=False).announce()
    assert not capsys.readouterr().err
