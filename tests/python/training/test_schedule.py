"""The length of a run and its learning rates: each schedule by hand, and as transformers has it."""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler

from logratio import TrainConfig, train
from logratio.errors import ConfigError
from logratio.training.checkpoint import ResumeError, _check_identity
from logratio.training.checkpoint_folder import SaveError
from logratio.training.config import UNRECORDED, DecayType, Schedule
from logratio.training.run_folder import RunExistsError
from logratio.training.schedule import DECAYS, FALLS, RunLength, learning_rate
from logratio.training.trainer import DPOTrainer

CONFIG = TrainConfig("model", ["pairs"], "out", lr=2.0, warmup=0.2)


WSD: dict[str, Any] = {"lr_scheduler": "wsd", "decay": 8, "min_lr_rate": 0.1}


def rates(config: TrainConfig, updates: int = 10) -> list[float]:
    return [learning_rate(config, done, updates) for done in range(updates)]


@pytest.mark.parametrize(
    ("settings", "name", "theirs"),
    [
        ({}, "cosine", {}),
        ({"lr_scheduler": "linear"}, "linear", {}),
        ({"lr_scheduler": "constant"}, "constant_with_warmup", {}),
        ({"min_lr_rate": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        *(
            (
                WSD | {"decay_type": name},
                "warmup_stable_decay",
                {"num_decay_steps": 8, "min_lr_ratio": 0.1, "decay_type": name},
            )
            for name in get_args(DecayType)
        ),
    ],
)
def test_a_schedule_equals_that_of_transformers(
    settings: dict[str, Any], name: str, theirs: dict[str, Any]
) -> None:
    """Theirs starts the warmup at 0; ours at the first step, so no update is lost."""
    warmup, updates = 4, 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = get_scheduler(name, optimizer, warmup, updates, scheduler_specific_kwargs=theirs)
    wanted = []
    for _ in range(updates):
        wanted.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = rates(replace(CONFIG, **settings), updates)
    assert found[warmup:] == pytest.approx(wanted[warmup:])
    assert found[:warmup] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_warmup_is_a_share_or_a_number_of_updates() -> None:
    shared, counted = (rates(replace(CONFIG, warmup=warmup), 20) for warmup in (0.2, 4))
    assert counted == shared
    assert rates(replace(CONFIG, warmup=1), 4) == rates(replace(CONFIG, warmup=0.25), 4)


@pytest.mark.parametrize(
    ("warmup", "words"),
    [
        (2.5, "warmup 2.5 is neither a share below 1 nor a whole number of updates"),
        (3, "warmup 3: the learning rate rises for 3 updates, and the run has 3: give fewer"),
        (0.99, "warmup 0.99: the learning rate rises for 3 updates"),
    ],
)
def test_a_warmup_that_never_ends_is_refused(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, warmup: float, words: str
) -> None:
    output = tmp_path / "out"
    config = TrainConfig(tiny_model, [pairs_file], output, max_steps=3, warmup=warmup)
    with pytest.raises(ConfigError, match=words):
        DPOTrainer(config=config, show_progress=False)


def test_a_decay_is_a_share_or_a_number_of_updates() -> None:
    shared, counted = (rates(replace(CONFIG, **WSD | {"decay": d}), 20) for d in (0.5, 8))
    assert counted == shared


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decay": 2.5}, "decay 2.5 is neither a share below 1 nor a whole number of updates"),
        ({"decay": 3}, "would fall for longer than the 2 updates after the warmup"),
        ({"lr_scheduler": "linear"}, "lr_scheduler linear has no decay: only wsd has one"),
    ],
)
def test_a_decay_that_does_not_fit_is_refused(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    config = TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", max_steps=3, warmup=1, **WSD | settings
    )
    with pytest.raises(ConfigError, match=words):
        DPOTrainer(config=config, show_progress=False)


def test_wsd_stays_and_then_falls_to_its_floor() -> None:
    config = replace(CONFIG, lr_scheduler="wsd", decay=0.5, min_lr_rate=0.5, warmup=0.0)
    assert rates(config, 8) == pytest.approx([2.0] * 5 + [1.75, 1.5, 1.25])


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_starts_at_the_peak_and_never_rises(name: Schedule) -> None:
    found = rates(replace(CONFIG, lr_scheduler=name, min_lr_rate=0.25), 50)[10:]
    assert found[0] == 2.0
    assert all(later <= earlier for earlier, later in pairwise(found))
    assert found[-1] >= 0.5


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"epochs": 2}, RunLength(6, 2, 20)),
        ({"max_steps": 2}, RunLength(2, 1, 8)),
        ({"max_steps": 3}, RunLength(3, 1, 10)),
        ({"max_steps": 7, "epochs": 9}, RunLength(7, 3, 24)),
    ],
)
def test_a_run_of_ten_groups_by_four(settings: dict[str, Any], length: RunLength) -> None:
    assert RunLength.of(replace(CONFIG, batch_size=4, **settings), 10) == length


def test_every_name_has_a_schedule() -> None:
    assert {*DECAYS, "wsd"} == set(get_args(Schedule))
    assert set(FALLS) == set(get_args(DecayType))


def test_max_steps_ends_a_run_and_schedules_it(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        tiny_model, pairs_file, tmp_path / "out", batch_size=8, max_steps=3, lr=1e-3, warmup=0.0
    )
    trainer = DPOTrainer(config=config, show_progress=False)
    result = trainer.train()
    assert [row["lr"] for row in result.history] == pytest.approx(rates(replace(config), 3))
    assert (result.steps, trainer.updates) == (3, 3)
    assert [row["epoch"] for row in result.history] == [0.5, 1.0, 1.5]
    again = train(replace(config), show_progress=False)
    assert again.was_finished


def test_a_run_that_only_lacks_its_model_trains_no_further_update(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though an epoch is not over: the checkpoint holds all updates that max_steps asks for."""

    def full(*_: object) -> None:
        raise OSError("no space")

    config = TrainConfig(
        tiny_model, pairs_file, tmp_path / "out", batch_size=8, max_steps=3, warmup=0.0
    )
    with (
        monkeypatch.context() as patch,
        pytest.raises(SaveError, match="resume=True to save the model"),
    ):
        patch.setattr("logratio.training.update_loop.save_run", full)
        train(config, show_progress=False)
    result = train(replace(config, resume=True), show_progress=False)
    assert (result.steps, result.history) == (3, [])


@pytest.mark.parametrize("changed", [{}, {"weight_decay": 0.1}, {"max_steps": 5}])
def test_a_run_recorded_before_these_settings_ran_with_their_defaults(
    changed: dict[str, Any], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    config = TrainConfig(tiny_model, pairs_file, tmp_path / "out", batch_size=8)
    train(config, show_progress=False)
    path = tmp_path / "out" / "training.json"
    settings = json.loads(path.read_text())
    recorded = settings["identity"]
    settings["identity"] = {name: recorded[name] for name in recorded.keys() - UNRECORDED.keys()}
    path.write_text(json.dumps(settings))
    again = replace(config, **changed)
    with pytest.raises(RunExistsError, match=next(iter(changed))) if changed else nullcontext():
        assert train(again, show_progress=False).was_finished
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"identity": settings["identity"]}))
    now = recorded | changed
    with pytest.raises(ResumeError, match=next(iter(changed))) if changed else nullcontext():
        _check_identity(checkpoint, now)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler": "sawtooth"}, {"min_lr_rate": 1.5}, {"decay": 0.0}, {"max_steps": 0},
        {"weight_decay": -0.1}, {"adam_beta2": 1.0}, {"adam_epsilon": -1.0},
        {"keep_checkpoints": 0},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_a_setting_out_of_range_is_named(
    settings: dict[str, Any], tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, TypeError), match=next(iter(settings))):
        DPOTrainer(tiny_model, pairs_file, output=tmp_path / "out", **settings)
