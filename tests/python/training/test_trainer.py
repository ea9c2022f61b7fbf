"""Training: the first loss, micro-batches, resuming, references, what is saved, what is refused."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_pairs
from safetensors.torch import load_file, save_file
from stop_after import stop_after
from tiny_models import tiny
from torch import Tensor

from logratio._rust import CacheReader, CacheWriter
from logratio.data import TokenizationRules
from logratio.errors import ConfigError
from logratio.logps.batch import Batch, TargetTokens
from logratio.logps.completion import completion_loss
from logratio.logps.head_loss import LossOf
from logratio.training import (
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    completion_logps,
    precompute,
    train,
)
from logratio.training.checkpoint import ResumeError, RunInterruptedError
from logratio.training.dataset import load_dataset
from logratio.training.fingerprint import model_fingerprint
from logratio.training.metrics import NonFiniteError
from logratio.training.models import ModelFolderError, load_model
from logratio.training.reference import StaleCacheError
from logratio.training.reference_checks import UntrustedReferenceError
from logratio.training.trainer import DPOTrainer
from logratio.training.update import Scored, Updater
from logratio.training.validation import reference_kind


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", lr=1e-3, batch_size=4, epochs=2, save_every=0
    )


def quiet(config: TrainConfig) -> list[dict[str, float]]:
    return train(config, show_progress=False).history


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def with_(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("loss", "expected"), [("dpo", math.log(2)), ("ipo", 25.0)])
def test_first_loss_is_the_known_one(config: TrainConfig, loss: str, expected: float) -> None:
    first = quiet(with_(config, loss=loss))[0]
    assert first["loss"] == pytest.approx(expected, abs=1e-5 * expected)
    assert first["rewards/accuracies"] == 0.5 or abs(first["rewards/margins"]) > 0
    assert first["gradient_weight"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "sft"])
def test_training_lowers_the_loss(config: TrainConfig, loss: str) -> None:
    history = quiet(with_(config, loss=loss, epochs=8, lr=3e-3))
    first, last = history[0]["loss"], history[-1]["loss"]
    assert last < 0.8 * first


def test_dpo_learns_the_preference(config: TrainConfig) -> None:
    last = quiet(with_(config, epochs=10, lr=3e-3))[-1]
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] > 0.5


def test_micro_batches_change_nothing(config: TrainConfig, tmp_path: Path) -> None:
    whole = quiet(with_(config, token_budget=10_000, output=tmp_path / "whole"))
    parts = quiet(with_(config, token_budget=1, output=tmp_path / "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_the_same_seed_gives_the_same_weights(config: TrainConfig, tmp_path: Path) -> None:
    quiet(with_(config, output=tmp_path / "a"))
    quiet(with_(config, output=tmp_path / "b"))
    quiet(with_(config, output=tmp_path / "c", seed=1))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resume_is_bitwise(
    config: TrainConfig, tmp_path: Path, lora: LoraSettings | None, stop: int
) -> None:
    config = with_(config, lora=lora)
    straight = with_(config, output=tmp_path / "straight")
    quiet(straight)
    stopped = with_(config, output=tmp_path / "stopped")
    with pytest.raises(RunInterruptedError), stop_after(stop):
        quiet(stopped)
    rest = quiet(with_(stopped, resume=True))
    assert len(rest) == 8 - stop
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    one = load_file(tmp_path / "straight" / name)
    assert equal(one, load_file(tmp_path / "stopped" / name))
    logs = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("straight", "stopped")]
    assert logs[0] == logs[1]


def test_resume_of_another_run_is_refused(config: TrainConfig) -> None:
    with pytest.raises(RunInterruptedError), stop_after(2):
        quiet(config)
    with pytest.raises(ValueError, match="differs in lr"):
        quiet(with_(config, resume=True, lr=1e-4))


def test_a_damaged_checkpoint_is_skipped(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet(with_(config, output=tmp_path / "straight"))
    with pytest.raises(RunInterruptedError), stop_after(5):
        quiet(with_(config, save_every=2))
    folder = tmp_path / "out" / "checkpoints"
    newest = sorted(folder.iterdir())[-1] / "weights.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    quiet(with_(config, save_every=2, resume=True))
    assert "weights.safetensors was altered" in capsys.readouterr().err
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "out"))


def test_an_unfinished_run_is_not_started_over(config: TrainConfig) -> None:
    with pytest.raises(RunInterruptedError), stop_after(2):
        quiet(config)
    with pytest.raises(FileExistsError, match="resume=True"):
        quiet(config)
    quiet(with_(config, resume=True))
    assert not (Path(config.output) / "checkpoints").exists()
    assert len(quiet(with_(config, overwrite=True))) == 8


def test_no_valid_checkpoint_is_an_error_not_a_fresh_start(config: TrainConfig) -> None:
    with pytest.raises(RunInterruptedError), stop_after(2):
        quiet(config)
    for path in (Path(config.output) / "checkpoints").rglob("manifest.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no valid checkpoint"):
        quiet(with_(config, resume=True))


def test_cached_frozen_and_adapter_references_agree(config: TrainConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    precompute(PrecomputeConfig(config.model, config.data, cache), show_progress=False)
    frozen = quiet(with_(config, output=tmp_path / "frozen"))
    cached = quiet(with_(config, output=tmp_path / "cached", cache=cache))
    for one, other in zip(frozen, cached, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    lora = with_(config, lora=LoraSettings(rank=4))
    adapter = quiet(with_(lora, output=tmp_path / "adapter"))
    cached = quiet(with_(lora, output=tmp_path / "cached_lora", cache=cache))
    for one, other in zip(adapter, cached, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_reference_kinds(config: TrainConfig) -> None:
    lora = LoraSettings()
    assert reference_kind(config) == "frozen"
    assert reference_kind(with_(config, lora=lora)) == "adapter"
    assert reference_kind(with_(config, lora=lora, cache="x")) == "cached"
    assert reference_kind(with_(config, loss="simpo")) == "none"


def test_a_cache_of_another_model_is_refused_with_the_difference(
    config: TrainConfig, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    cache = tmp_path / "cache"
    precompute(PrecomputeConfig(make_model("b", 7), config.data, cache), show_progress=False)
    with pytest.raises(StaleCacheError, match=r"different reference .*differs in weights"):
        quiet(with_(config, cache=cache))


def test_a_cache_that_lacks_rows_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    few = write_pairs(tmp_path / "few.jsonl", 3)
    precompute(PrecomputeConfig(config.model, [few], cache), show_progress=False)
    with pytest.raises(StaleCacheError, match="are not in the cache"):
        quiet(with_(config, cache=cache))


def test_a_cache_with_wrong_numbers_is_refused(
    config: TrainConfig, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    """The fingerprint is that of this model, but the log-probs are not."""
    cache, other = tmp_path / "cache", make_model("b", 7)
    precompute(PrecomputeConfig(other, config.data, cache), show_progress=False)
    right, wrong = model_fingerprint(config.model), model_fingerprint(other)
    keys = load_dataset(config.model, config.data, config.rules, show_progress=False).store.keys()
    reader = CacheReader.open(cache / wrong.name, wrong.digest)
    offsets, logps = reader.read(reader.join(keys))
    (cache / right.name).mkdir()
    writer = CacheWriter(cache / right.name, right.digest)
    writer.append(keys, offsets, logps)
    writer.close()
    with pytest.raises(UntrustedReferenceError, match="the reference cannot be trusted"):
        quiet(with_(config, cache=cache))


def test_non_finite_stops_before_the_weights_and_names_the_record(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logratio.training import update as module

    real, real_loss = completion_logps, completion_loss

    def poison(logps: Tensor, targets: TargetTokens) -> Tensor:
        return logps * (float("nan") if 7 in targets.groups.tolist() else 1.0)

    def poisoned(policy: torch.nn.Module, batch: Batch) -> Tensor:
        return poison(real(policy, batch), batch.targets)

    def poisoned_loss(
        policy: torch.nn.Module, batch: Batch, loss_of: LossOf, _routed: None = None
    ) -> Tensor:
        return real_loss(policy, batch, lambda x, part: loss_of(poison(x, part.targets), part))

    monkeypatch.setattr(module, "completion_logps", poisoned)
    monkeypatch.setattr(module, "completion_loss", poisoned_loss)
    monkeypatch.setattr(DPOTrainer, "_check_start", lambda *_, **__: None)  # it would stop earlier
    with pytest.raises(NonFiniteError, match=r"pairs\.jsonl:8"):
        quiet(config)
    assert not (Path(config.output) / "model.safetensors").exists()
    text = (Path(config.output) / "metrics.jsonl").read_text()
    assert "NaN" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    config: TrainConfig, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and log-probs are finite: only the gradient's norm shows it."""
    real, before = Updater.accumulate, dict[str, Tensor]()
    updaters = list[Updater]()

    def poisoned(updater: Updater, *given: Any, **options: Any) -> list[Scored]:
        scored = real(updater, *given, **options)
        if len(updater._recent) == 2:  # the third update
            updaters.append(updater)
            before.update(copied(updater.policy))
            gradient = updater.parameters[-1].grad
            assert gradient is not None
            gradient.view(-1)[0] = value
        return scored

    monkeypatch.setattr(Updater, "accumulate", poisoned)
    with pytest.raises(
        NonFiniteError, match="update 3: grad_norm not finite; stopped before updating the weights"
    ):
        quiet(config)
    assert equal(copied(updaters[0].policy), before)
    assert not (Path(config.output) / "model.safetensors").exists()
    rows = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "no-such-method"}, "unknown"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "no label_smoothing"),
        ({"gamma": 2.0}, "no gamma"),
        ({"loss": "simpo", "cache": "x"}, "no reference"),
        ({"lr": 0.0}, "lr"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_cannot_work(
    config: TrainConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        quiet(with_(config, **changes))


def test_unknown_model_folder(config: TrainConfig) -> None:
    with pytest.raises(ModelFolderError, match="no such model folder"):
        quiet(with_(config, model="nowhere"))


def test_weights_that_can_run_code_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="no safetensors weights"):
        quiet(with_(config, model=tmp_path / "pickled"))


def test_weights_that_would_be_random_are_refused(
    config: TrainConfig, make_model: Callable[..., Path]
) -> None:
    """Transformers makes up what the files lack, another one each time, under one fingerprint."""
    folder = make_model("torn")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"missing weights: model\.layers\.0.* and 1 more"):
        quiet(with_(config, model=folder))


def test_unwritable_output(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write here"):
        quiet(with_(config, output=tmp_path / "file" / "below"))


def test_the_output_is_a_model_folder(config: TrainConfig) -> None:
    quiet(config)
    output = Path(config.output)
    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"} <= names
    assert {"training.json", "data_report.json", "tensorboard"} <= names
    assert not {".saving", "train.store", "refused.jsonl"} & names
    again = with_(config, model=output, output=output.parent / "second")
    assert len(quiet(again)) == 8


def test_lora_trains_adapters_only_and_loads_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(config.model).parent)
    relative = with_(config, model=Path(config.model).name)
    quiet(with_(relative, lora=LoraSettings(rank=4), lr=1e-2))
    monkeypatch.chdir(tmp_path)
    adapter = load_model(config.output)
    base = load_model(config.model)
    inner = adapter.get_base_model()  # type: ignore[operator]
    for name, value in base.named_parameters():
        renamed = name.replace(".weight", ".base_layer.weight")
        state: dict[str, Tensor] = dict(inner.named_parameters())
        assert torch.equal(value, state[renamed if renamed in state else name])


def test_a_model_is_never_written_over(
    config: TrainConfig, make_model: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match="folder of an input model"):
        quiet(with_(config, output=config.model))
    with pytest.raises(ConfigError, match="logratio did not train"):
        quiet(with_(config, output=make_model("precious")))


def test_a_second_run_leaves_nothing_of_the_first(config: TrainConfig) -> None:
    quiet(with_(config, lora=LoraSettings(rank=2)))
    quiet(with_(config, overwrite=True))
    names = {path.name for path in Path(config.output).iterdir()}
    assert "model.safetensors" in names
    assert not {name for name in names if name.startswith("adapter")}
    quiet(with_(config, overwrite=True, lora=LoraSettings(rank=2)))
    assert not (Path(config.output) / "model.safetensors").exists()


def test_bf16_stays_near_fp32(config: TrainConfig, tmp_path: Path) -> None:
    full = quiet(with_(config, output=tmp_path / "full"))
    half = quiet(with_(config, output=tmp_path / "half", precision="bf16"))
    assert half[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    for one, other in zip(full, half, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.05)


def test_slow_threads_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from logratio.training import torch_settings

    cpu, times = torch.device("cpu"), iter([0.4, 0.1, 0.1, 0.1])
    monkeypatch.setattr(torch_settings, "_seconds", lambda: next(times))
    assert torch_settings.advice(cpu) is None  # there is one thread
    torch.set_num_threads(2)
    try:
        expected = torch_settings.advice(cpu)
        assert expected is not None
        assert "4.0 times" in expected
        assert torch_settings.advice(cpu) is None
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_resume_with_another_model_is_refused(
    config: TrainConfig, make_model: Callable[..., Path]
) -> None:
    with pytest.raises(RunInterruptedError), stop_after(2):
        quiet(config)
    other = make_model("other", 9)
    with pytest.raises(ResumeError, match="differs in model, reference"):
        quiet(with_(config, resume=True, model=other))
    with pytest.raises(ResumeError, match="differs in reference"):
        quiet(with_(config, resume=True, reference=other))
    with pytest.raises(ResumeError, match="differs in lora"):
        quiet(with_(config, resume=True, lora=LoraSettings()))


def test_an_adapter_can_be_trained_further(config: TrainConfig, tmp_path: Path) -> None:
    quiet(with_(config, loss="sft", lora=LoraSettings(rank=4), lr=1e-2))
    further = with_(config, model=config.output, output=tmp_path / "further")
    ready = DPOTrainer(config=further, show_progress=False)
    assert ready.forecast.memory_bytes > 0
    history = ready.train().history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (tmp_path / "further" / "model.safetensors").exists()


def test_simpo_reports_no_logratios(config: TrainConfig) -> None:
    (first, *_) = quiet(with_(config, loss="simpo"))
    assert "rewards/margins" in first
    assert not any(name.startswith("logratios") for name in first)


def test_sequences_beyond_the_models_positions_are_refused(config: TrainConfig) -> None:
    path = Path(config.data[0])
    row = {"prompt": "the cat", "chosen": " happy" * 600, "rejected": " sad"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="positions"):
        quiet(config)
    quiet(with_(config, rules=TokenizationRules(max_length=512)))


def test_dropout_is_off_whatever_it_is_called(config: TrainConfig) -> None:
    """OPT keeps its rate as a plain number and asks `training`, which therefore stays False."""
    from transformers import OPTConfig

    opt = tiny(
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, dropout=0.5, bos_token_id=1, eos_token_id=2,
        ),
        scale=1.0,
    )  # fmt: skip
    opt.save_pretrained(Path(config.output).parent / "opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(config.model) / name
        (Path(config.output).parent / "opt" / name).write_bytes(source.read_bytes())
    first, *_ = quiet(with_(config, model=Path(config.output).parent / "opt"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
