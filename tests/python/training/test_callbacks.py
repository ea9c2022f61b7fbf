"""Callbacks: what they see, stopping a run, exceptions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import logratio
from logratio.errors import ConfigError
from logratio.training import (
    Callback,
    CallbackError,
    HeldOutResult,
    RunState,
    TrainConfig,
    TrainResult,
)
from logratio.training.trainer import DPOTrainer


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model,
        [pairs_file],
        tmp_path / "out",
        lr=3e-3,
        batch_size=4,
        epochs=2,
        save_every=3,
        eval_share=0.25,
    )


class Diary(Callback):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_start(self, state: RunState) -> None:
        self.calls.append(("start", state.step))

    def on_update(self, state: RunState, metrics: Mapping[str, float]) -> None:
        assert metrics["epoch"] == state.epoch
        self.calls.append(("update", state.step))

    def on_evaluate(self, state: RunState, result: HeldOutResult) -> None:
        assert result.step == state.step
        self.calls.append(("evaluate", state.step))

    def on_checkpoint(self, state: RunState, folder: Path) -> None:
        assert (folder / "state.json").exists()
        self.calls.append(("checkpoint", state.step))

    def on_end(self, state: RunState, result: TrainResult) -> None:
        assert (result.output / "model.safetensors").exists()
        self.calls.append(("end", state.step))


def test_callbacks_are_called_in_order(config: TrainConfig) -> None:
    diary = Diary()
    DPOTrainer(config=config, callbacks=[diary], show_progress=False).train()
    assert diary.calls == [
        *[("start", 0), ("update", 1), ("update", 2), ("update", 3)],
        *[("evaluate", 3), ("checkpoint", 3), ("update", 4), ("update", 5), ("update", 6)],
        *[("evaluate", 6), ("end", 6)],
    ]


class KeepModels(Callback):
    """The example of the documentation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_checkpoint(self, state: RunState, folder: Path) -> None:
        saved: Any = state.policy
        saved.save_pretrained(self.folder / f"{state.step}")
        self.weights = load_file(folder / "weights.safetensors")


def test_a_callback_keeps_a_model_that_outlives_the_checkpoints(
    config: TrainConfig, tmp_path: Path
) -> None:
    keep = KeepModels(tmp_path / "models")
    DPOTrainer(config=config, callbacks=[keep], show_progress=False).train()
    assert not (tmp_path / "out" / "checkpoints").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "3")
    found = dict(model.named_parameters())
    assert keep.weights.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in keep.weights.items())


class StopAtMargin(Callback):
    """The example of the documentation."""

    def on_update(self, state: RunState, metrics: Mapping[str, float]) -> None:
        if metrics["rewards/margins"] > 0.02:
            state.stop("the margin is above 0.02")


def test_a_callback_stops_a_run_which_is_then_finished(config: TrainConfig) -> None:
    trainer = DPOTrainer(config=config, callbacks=[StopAtMargin()], show_progress=False)
    result = trainer.train()
    assert 1 < result.steps < trainer.updates
    assert result.history[-1]["rewards/margins"] > 0.02
    assert result.history[-2]["rewards/margins"] <= 0.02
    assert result.evaluations[-1]["step"] == result.steps, "the last update is evaluated"
    again = DPOTrainer(config=config, show_progress=False).train()
    assert again.was_finished
    assert again.stop_reason == "the margin is above 0.02"


class Broken(Callback):
    def on_update(self, state: RunState, metrics: Mapping[str, float]) -> None:
        if state.step == 2:
            raise ZeroDivisionError("my own mistake")


def test_an_exception_ends_the_run_and_loses_nothing(config: TrainConfig) -> None:
    with pytest.raises(CallbackError, match=r"Broken\.on_update raised ZeroDivisionError") as found:
        DPOTrainer(config=config, callbacks=[Broken()], show_progress=False).train()
    assert isinstance(found.value.__cause__, ZeroDivisionError)
    assert "checkpoint-00000002" in str(found.value)
    diary = Diary()
    resumed = DPOTrainer(
        config=TrainConfig(**{**vars(config), "resume": True}),
        callbacks=[diary],
        show_progress=False,
    )
    resumed.train()
    assert diary.calls[:2] == [("start", 2), ("update", 3)]


def test_only_callbacks_are_accepted(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"instances of logratio\.Callback"):
        DPOTrainer(config=config, callbacks=[print], show_progress=False)  # type: ignore[list-item]


class Transformers(Callback):
    def on_step_end(self, args: object, state: object, control: object) -> None: ...


def test_a_method_that_would_never_be_called_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="on_step_end is never called: use on_update"):
        DPOTrainer(config=config, callbacks=[Transformers()], show_progress=False)


class Forger(Callback):
    def on_update(self, state: RunState, metrics: Mapping[str, float]) -> None:
        metrics["loss"] = 0.0  # type: ignore[index]


def test_a_callback_cannot_change_the_metrics(config: TrainConfig) -> None:
    with pytest.raises(CallbackError, match="TypeError"):
        DPOTrainer(config=config, callbacks=[Forger()], show_progress=False).train()


def test_the_base_class_is_at_the_front_door() -> None:
    assert logratio.Callback is Callback
