"""Held-out evaluation in a run: the split, its values, the best model, early stopping, resuming."""

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import in_float64, per_token_logps
from safetensors.torch import load_file
from stop_after import stop_after
from torch import Tensor

from logratio._rust import Store, StoreWriter
from logratio.errors import ConfigError, LogratioError
from logratio.intervals import wilson
from logratio.training import (
    Callback,
    HeldOutResult,
    LoraSettings,
    RunInterruptedError,
    RunState,
    TrainConfig,
    TrainResult,
    load_model,
    memory,
    train,
)
from logratio.training import held_out as module
from logratio.training.dataset import load_dataset
from logratio.training.held_out import split_by_prompt
from logratio.training.trainer import DPOTrainer


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    """Eight updates in two epochs, with three evaluations in each."""
    return TrainConfig(
        tiny_model,
        [pairs_file],
        tmp_path / "out",
        lr=3e-3,
        batch_size=4,
        epochs=2,
        save_every=0,
        eval_data=[write_pairs(tmp_path / "held.jsonl", 36)],
        eval_every=2,
    )


def with_(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def quiet(config: TrainConfig, *callbacks: Callback) -> TrainResult:
    return DPOTrainer(config=config, callbacks=callbacks, show_progress=False).train()


def rows_of(config: TrainConfig, name: str = "evaluations.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / name).read_text().splitlines()]


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def store_of(prompts: list[int]) -> Store:
    """Return one pair for each prompt, of one token."""
    writer = StoreWriter()
    ids = np.array([3, 4], dtype=np.int32)
    for line, prompt in enumerate(prompts, 1):
        writer.push(
            np.array([prompt], dtype=np.int32),
            ids,
            np.ones(2, dtype=np.uint8),
            np.array([1, 1], dtype=np.uint32),
            np.array([0, 1], dtype=np.uint8),
            0,
            line,
        )
    return writer.finish()


class TestSplit:
    @given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.floats(0.01, 0.99))
    @settings(deadline=None)
    def test_no_prompt_is_on_both_sides(self, prompts: list[int], share: float) -> None:
        if len(set(prompts)) < 2:
            with pytest.raises(ConfigError, match="two different prompts"):
                split_by_prompt(store_of(prompts), share, 0)
            return
        held = split_by_prompt(store_of(prompts), share, 0)
        sides = [
            {p for p, one in zip(prompts, held, strict=True) if one == side} for side in (0, 1)
        ]
        assert all(sides)
        assert not sides[0] & sides[1]

    def test_the_share_is_met(self) -> None:
        held = split_by_prompt(store_of(list(range(1000))), 0.05, 0)
        assert held.sum() == 50

    def test_the_order_of_the_data_does_not_matter_and_the_seed_does(self) -> None:
        prompts = list(range(100))
        forth, back = (
            {
                p
                for p, one in zip(order, split_by_prompt(store_of(order), 0.2, 0), strict=True)
                if one
            }
            for order in (prompts, prompts[::-1])
        )
        assert forth == back
        other = np.flatnonzero(split_by_prompt(store_of(prompts), 0.2, 1))
        assert set(other.tolist()) != forth


def test_values_are_those_of_a_plain_float64_model(config: TrainConfig) -> None:
    """After the last update, from the saved model, one sequence at a time."""
    last = quiet(config).evaluations[-1]
    held = load_dataset(config.model, config.eval_data, config.rules, show_progress=False).store
    groups = [
        (prompt.tolist(), [one.tolist() for one in completions])
        for prompt, completions, _, _ in map(held.group, range(len(held)))
    ]
    lengths = [len(one) for _, completions in groups for one in completions]

    def sums(folder: Any) -> Tensor:
        with torch.no_grad():
            logps = per_token_logps(in_float64(load_model(folder)), groups)
        return torch.stack([part.sum() for part in logps.split(lengths)]).view(-1, 2)

    policy, reference = sums(config.output), sums(config.model)
    rewards = 0.1 * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "eval_loss": float(-torch.nn.functional.logsigmoid(margins).mean()),
        "eval_rewards/margins": float(margins.mean()),
        "eval_rewards/accuracies": float((margins > 0).double().mean()),
        "eval_logps/rejected": float(policy[:, 1].mean()),
        "eval_logratios/chosen": float((policy - reference)[:, 0].mean()),
    }
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert last["groups"] == 36
    assert last["step"] == 8
    assert last["accuracy_interval"] == list(wilson(last["eval_rewards/accuracies"], 36))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_evaluating_changes_nothing_else(
    config: TrainConfig, tmp_path: Path, lora: LoraSettings | None
) -> None:
    config = with_(config, lora=lora, epochs=1, eval_samples=2, max_new_tokens=4)
    without = with_(
        with_(config, eval_data=None, eval_every=None, eval_samples=0),
        max_new_tokens=TrainConfig.max_new_tokens,
        output=tmp_path / "without",
    )
    assert quiet(config).history == quiet(without).history
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (Path(config.output) / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_reference_is_the_same_from_wherever_it_comes(
    config: TrainConfig, tmp_path: Path
) -> None:
    """A frozen model, adapters off, a cache that `precompute` also fills for held-out pairs."""
    config = with_(config, lora=LoraSettings(rank=4), epochs=1, eval_samples=3, max_new_tokens=5)
    cached = with_(config, cache=tmp_path / "cache", precompute=True, output=tmp_path / "cached")
    frozen = with_(config, reference=config.model, output=tmp_path / "frozen")
    expected = quiet(config).evaluations
    for other in (cached, frozen):
        for one, row in zip(expected, quiet(other).evaluations, strict=True):
            numbers = [name for name, value in one.items() if isinstance(value, float)]
            assert "eval_kl" in numbers
            assert [row[n] for n in numbers] == pytest.approx([one[n] for n in numbers], rel=1e-4)
    again = with_(cached, precompute=False, output=tmp_path / "again")
    assert quiet(again).evaluations == rows_of(cached)


@pytest.mark.parametrize("loss", ["sft", "simpo", "ipo"])
def test_every_loss_is_evaluated(config: TrainConfig, loss: str) -> None:
    first, *_, last = quiet(with_(config, loss=loss)).evaluations
    assert last["eval_loss"] < first["eval_loss"]
    assert ("eval_rewards/accuracies" in last) == (loss != "sft")


def test_a_share_is_evaluated_and_not_trained_on(config: TrainConfig) -> None:
    config = with_(config, eval_data=None, eval_share=0.25, epochs=1, eval_every=None)
    trainer = DPOTrainer(config=config, show_progress=False)
    assert len(trainer.store) == 12
    assert trainer.updates == 3
    result = trainer.train()
    assert [row["groups"] for row in result.evaluations] == [4]
    assert [row["step"] for row in result.evaluations] == [3]


def test_each_source_has_its_accuracy(config: TrainConfig, tmp_path: Path) -> None:
    flipped = tmp_path / "flipped.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()][20:30]
    flipped.write_text(
        "".join(
            json.dumps({**row, "chosen": row["rejected"], "rejected": row["chosen"]}) + "\n"
            for row in rows
        )
    )
    both = [*config.eval_data, flipped]  # type: ignore[misc]
    last = quiet(with_(config, eval_data=both, epochs=6, eval_every=None)).evaluations[-1]
    found = {Path(name).name: value for name, value in last["sources"].items()}
    assert found["held.jsonl"]["value"] > 0.9
    assert found["flipped.jsonl"]["value"] < 0.1
    assert found["flipped.jsonl"]["groups"] == 10


def test_samples_of_both_models_are_kept(config: TrainConfig) -> None:
    quiet(with_(config, eval_samples=3, max_new_tokens=6, epochs=1))
    rows = rows_of(config, "samples.jsonl")
    assert [row["step"] for row in rows] == [2] * 3 + [4] * 3
    assert {row["prompt"].partition(" ")[0] for row in rows} == {"the"}, "without <s>"
    assert not [row for row in rows if row["policy"][:1] == " " or "</s>" in row["policy"]]
    assert not [row for row in rows if row["policy_truncated"] != (len(row["policy"].split()) == 6)]
    assert [row["reference"] for row in rows[:3]] == [row["reference"] for row in rows[3:]]
    last = rows_of(config)[-1]
    assert last["kl"]["samples"] == 3
    assert last["eval_kl"] == last["kl"]["nats"]


class Watched(Callback):
    """Keeps the weights at each evaluation."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.values: dict[int, float] = {}

    def on_evaluate(self, state: RunState, result: HeldOutResult) -> None:
        self.weights[state.step] = {
            name: value.clone() for name, value in state.policy.state_dict().items()
        }
        self.values[state.step] = result.metrics["eval_loss"]


def overshooting(config: TrainConfig) -> TrainConfig:
    """Held-out pairs of which most have the opposite label: they get worse after some updates."""
    path = Path(config.output).parent / "opposite.jsonl"
    rows = [json.loads(line) for line in Path(config.data[0]).read_text().splitlines()]
    path.write_text(
        "".join(
            json.dumps(
                {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if n % 3 else row
            )
            + "\n"
            for n, row in enumerate(rows)
        )
    )
    return with_(config, eval_data=[path], eval_every=1, best_metric="loss", epochs=3)


def test_the_best_model_is_the_one_that_is_saved(config: TrainConfig) -> None:
    watched, config = Watched(), overshooting(config)
    result = quiet(config, watched)
    best = min(watched.values, key=lambda step: watched.values[step])
    assert result.best_step == best < result.steps == 12
    saved = weights(config.output)
    assert all(torch.equal(value, watched.weights[best][name]) for name, value in saved.items())
    written = json.loads((Path(config.output) / "training.json").read_text())
    assert (written["steps"], written["best_step"]) == (12, best)
    assert not (Path(config.output) / "checkpoints").exists()
    assert quiet(config).best_step == best, "a finished run remembers it"


def test_a_run_stops_early(config: TrainConfig) -> None:
    config = with_(overshooting(config), early_stop=2, epochs=6)
    result = quiet(config)
    assert result.best_step is not None
    assert result.steps == result.best_step + 2
    assert "2 evaluations without improvement" in str(result.stop_reason)
    again = quiet(config)
    assert again.was_finished
    assert (again.steps, again.stop_reason) == (result.steps, result.stop_reason)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_resumed_run_is_the_same_run(config: TrainConfig, tmp_path: Path, step: int) -> None:
    """Stopped before, in and after evaluations; with the best model and the patience so far."""
    config = with_(overshooting(config), early_stop=3, epochs=6, eval_every=2)
    whole = quiet(with_(config, output=tmp_path / "whole"))
    with pytest.raises(RunInterruptedError), stop_after(step):
        quiet(config)
    resumed = quiet(with_(config, resume=True))
    assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
    assert resumed.evaluations == whole.evaluations
    assert equal(weights(config.output), weights(tmp_path / "whole"))
    for name in ("evaluations.jsonl", "metrics.jsonl"):
        assert rows_of(config, name) == rows_of(with_(config, output=tmp_path / "whole"), name)


class Dies(Callback):
    """Ends the process, as far as a test can, once the checkpoint of an update is written."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_checkpoint(self, state: RunState, folder: Path) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


def test_a_run_that_dies_after_its_last_evaluation_still_stops_early(
    config: TrainConfig, tmp_path: Path
) -> None:
    """The checkpoint has the state in which the run was about to stop."""
    config = with_(overshooting(config), early_stop=2, epochs=6, save_every=1)
    whole = quiet(with_(config, output=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        quiet(config, Dies(whole.steps))
    resumed = quiet(with_(config, resume=True))
    assert (resumed.steps, resumed.stop_reason) == (whole.steps, whole.stop_reason)
    assert equal(weights(config.output), weights(tmp_path / "whole"))


def test_the_divided_data_is_in_files_that_are_gone(config: TrainConfig) -> None:
    config = with_(config, eval_data=None, eval_share=0.25)
    trainer = DPOTrainer(config=config, show_progress=False)
    assert trainer.store.path is not None, "mapped, not in memory"
    assert not trainer.store.path.exists()
    assert not [*Path(config.output).rglob("*.store")]
    assert trainer.train().steps == 6


@pytest.mark.parametrize("at", [2, 8])
def test_a_signal_ends_an_evaluation_which_is_then_repeated(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Also the last one, after which no update follows."""
    whole = quiet(with_(config, output=tmp_path / "whole"))
    evaluate = module.HeldOut.evaluate

    def interrupted(self: Any, step: int, *given: Any) -> HeldOutResult:
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, step, *given)

    with monkeypatch.context() as patch, pytest.raises(RunInterruptedError) as stopped:
        patch.setattr(module.HeldOut, "evaluate", interrupted)
        quiet(config)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert at not in [row["step"] for row in rows_of(config)]
    assert quiet(with_(config, resume=True)).evaluations == whole.evaluations
    assert equal(weights(config.output), weights(tmp_path / "whole"))


def test_a_damaged_best_model_is_named(config: TrainConfig) -> None:
    config = with_(overshooting(config), save_every=1)
    with pytest.raises(RunInterruptedError), stop_after(4):
        quiet(config)
    (best,) = (Path(config.output) / "checkpoints").glob("best-*")
    (best / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(LogratioError, match=r"best-.*weights\.safetensors was altered"):
        quiet(with_(config, resume=True))


def test_only_the_needed_best_models_are_kept(config: TrainConfig) -> None:
    """Those of the kept checkpoints: a run resumed from an older one needs its own."""
    config = with_(overshooting(config), save_every=1, keep_checkpoints=2)
    with pytest.raises(RunInterruptedError), stop_after(9):
        quiet(config)
    folder = Path(config.output) / "checkpoints"
    states = [json.loads(p.read_text()) for p in folder.glob("checkpoint-*/state.json")]
    needed = {f"best-{state['selection']['best_step']:08d}" for state in states}
    assert {path.name for path in folder.glob("best-*")} == needed
    assert len(states) == 2


def test_the_forecast_counts_the_evaluations(config: TrainConfig) -> None:
    """Three of 36 pairs in a run of eight updates over 16 pairs."""
    seen: list[tuple[float, int]] = []

    def noted(model: object, tokens: float, per_parameter: int, *_: object) -> float:
        seen.append((tokens, per_parameter))
        return 1.0

    trainer = DPOTrainer(config=with_(config, eval_every=3), show_progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "seconds", noted)
        assert trainer.forecast.seconds == 2.0 + 3 * 1.0 + 1.0, "the reference scores them once"
    assert trainer.held_out is not None
    tokens = float(trainer.held_out.store.shared_lengths().sum())
    assert seen[-2:] == [(tokens, memory.FORWARD)] * 2
    assert ", 3 evaluations, " in trainer.forecast.notes


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_the_forecast_counts_the_samples(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """One second for each pass, whatever its size, and ten for each model that samples."""
    monkeypatch.setattr(memory, "seconds", lambda *_: 1.0)
    monkeypatch.setattr(memory, "sampling_seconds", lambda *_: 10.0)
    config = with_(config, loss=loss, eval_every=4)
    without, sampling = (
        DPOTrainer(config=one, dry_run=True, show_progress=False).forecast
        for one in (config, with_(config, eval_samples=5))
    )
    own, reference = 2 * (10 + 1), 10 + 2 * 1
    assert sampling.seconds - without.seconds == own + (reference if loss == "dpo" else 0)
    assert "2 evaluations with 5 samples" in sampling.notes


def test_longer_and_more_samples_take_longer(tiny_model: Path) -> None:
    one, two, three = (
        memory.sampling_seconds(tiny_model, 1_000, steps, "cpu") for steps in (10, 20, 30)
    )
    assert two - one == pytest.approx(three - two)  # apart from the prompts, twice as long
    assert two - one > 0
    assert memory.sampling_seconds(tiny_model, 1e12, 10, "cpu") > 10 * one


def test_held_out_prompts_that_are_trained_on_are_counted(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    DPOTrainer(config=config, show_progress=False)
    assert "16 of 36 held-out groups have a prompt that is also" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_share": 0.1}, "give one of them"),
        ({"eval_data": None}, "eval_every needs held-out data"),
        ({"best_metric": "accuracy"}, "choose from loss, .*rewards/accuracies"),
        ({"best_metric": "kl"}, "best_metric kl is measured on samples: set eval_samples"),
        ({"early_stop": 2}, "early_stop needs best_metric"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"eval_data": None, "eval_share": 1.5}, "eval_share must be at least 0 and below 1"),
        ({"eval_samples": 2, "max_new_tokens": 10_000}, "lower max_new_tokens"),
    ],
)
def test_settings_that_cannot_work(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOTrainer(config=with_(config, **changes), show_progress=False)


def test_the_command_takes_the_flags_and_those_of_transformers(
    run: Run, config: TrainConfig, tmp_path: Path
) -> None:
    held, other = tmp_path / "held.jsonl", write_pairs(tmp_path / "other.jsonl", 5)
    code, _, err = run(
        *("train", "--model", config.model, "--data", config.data[0], "--output", tmp_path / "x"),
        *("--batch-size", 8, "--eval-data", held, other, "--eval-steps", 1, "--eval-samples", 2),
        *("--metric-for-best-model", "eval_rewards/accuracies", "--max-new-tokens", 3),
    )
    assert code == 0, err
    rows = rows_of(with_(config, output=tmp_path / "x"))
    assert [row["step"] for row in rows] == [1, 2]
    assert {Path(name).name for name in rows[0]["sources"]} == {"held.jsonl"}, "the rest are copies"


def test_metrics_go_to_callers_under_the_names_of_training(
    config: TrainConfig, make_model: Callable[..., Path]
) -> None:
    result = train(config, show_progress=False)
    for row in result.evaluations:
        names = {name.removeprefix("eval_") for name in row if name.startswith("eval_")}
        assert names - {"expected_calibration_error"} <= result.history[0].keys()
    assert "eval_rewards/accuracies" in repr(result)
