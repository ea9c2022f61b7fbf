"""CachedDPOTrainer gives the losses of TRL's DPOTrainer, without a reference model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import write_pairs
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOTrainer
from trl_trainers import cached, load, losses, settings
from trl_trainers import pairs as pairs
from trl_trainers import parts as parts

from logratio.integrations.trl import COLUMNS, TESTED, CachedDPOTrainer, TrlError, check_trl
from logratio.training.reference import StaleCacheError

# Warnings of TRL and its dependencies are not under test.
pytestmark = pytest.mark.filterwarnings("ignore")

LN_2 = 0.6931471805599453
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disable the progress bars of transformers and datasets."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


def assert_same(found: list[float], expected: list[float]) -> None:
    assert len(found) == 4
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.0, "max_length": 9},
        {"max_length": 9},
        {"max_length": 7, "truncation_mode": "keep_end"},
        {"max_length": 3, "truncation_mode": "keep_end"},  # no prompt token is left
        {"loss_type": "ipo"},
        {"pad_to_multiple_of": 16, "loss_type": "apo_zero"},
    ],
    ids=str,
)
def test_losses_equal_those_of_trl_with_a_reference_model(
    options: dict[str, Any], parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    expected = losses(DPOTrainer(args=settings(tmp_path, **options), **parts()))
    trainer = cached(tmp_path, tiny_model, parts(), **options)
    found = losses(trainer)
    assert trainer.ref_model is None
    assert_same(found, expected)
    if "loss_type" not in options:
        assert found[0] == pytest.approx(LN_2, abs=1e-6)


def test_reference_may_be_another_model_than_the_policy(
    parts: Callable[..., Any], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_model("other", seed=3)
    expected = losses(DPOTrainer(ref_model=load(other), args=settings(tmp_path), **parts()))
    found = losses(cached(tmp_path, other, parts()))
    assert_same(found, expected)
    assert abs(found[0] - LN_2) > 0.01


def test_the_base_is_the_reference_of_adapters(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    expected = losses(DPOTrainer(args=settings(tmp_path), peft_config=LORA, **parts()))
    trainer = cached(tmp_path, tiny_model, parts(peft_config=LORA))
    assert trainer.ref_model is None
    assert_same(losses(trainer), expected)
    assert expected[0] == pytest.approx(LN_2, abs=1e-6)


def test_an_already_trained_adapter_is_its_own_reference(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Regression: the base was used as the reference of an adapter on an adapter."""
    torch.manual_seed(0)
    made = get_peft_model(load(tiny_model), LORA)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    made.peft_config["default"].base_model_name_or_path = str(tiny_model)
    made.save_pretrained(str(tmp_path / "adapter"))

    def loaded() -> Any:
        model = PeftModel.from_pretrained(load(tiny_model), tmp_path / "adapter", is_trainable=True)
        return parts(model=model)

    expected = losses(DPOTrainer(args=settings(tmp_path), **loaded()))
    found = losses(cached(tmp_path, tmp_path / "adapter", loaded()))
    assert_same(found, expected)
    assert found[0] == pytest.approx(LN_2, abs=1e-6)
    with pytest.raises(StaleCacheError, match=r"was loaded from .* nats per completion away"):
        cached(tmp_path, tiny_model, loaded())


def test_a_filled_cache_trains_the_same_weights_as_an_empty_one(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """With dropout, filling the cache must not change the random state of training."""
    dropping = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    weights = []
    for _ in range(2):
        parted = parts(peft_config=dropping)
        trainer = cached(tmp_path, tiny_model, parted, disable_dropout=False)
        trainer.train()
        weights.append({n: w.detach() for n, w in trainer.model.named_parameters()})
    cold, warm = weights
    assert any(weight.any() for name, weight in cold.items() if "lora_B" in name)
    assert all(torch.equal(cold[name], warm[name]) for name in cold)


def test_a_model_that_differs_from_its_folder_is_detected(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    changed = parts()
    with torch.no_grad():
        changed["model"].lm_head.weight.mul_(1.01)
    with pytest.raises(StaleCacheError, match="nats per completion away"):
        cached(tmp_path, tiny_model, changed)
    args = settings(tmp_path, precompute_ref_log_probs=True)
    asked: dict[str, Any] = {"cache": tmp_path / "cache", "reference": tiny_model, "args": args}
    assert CachedDPOTrainer(**asked, check=False, **changed).ref_model is None


def test_columns_equal_what_trl_computes(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    args = settings(tmp_path, precompute_ref_log_probs=True, ld_alpha=0.5)
    expected = DPOTrainer(args=args, **parts()).train_dataset
    found = cached(tmp_path, tiny_model, parts(), ld_alpha=0.5).train_dataset
    for name in COLUMNS:
        assert found[name][:] == pytest.approx(expected[name][:], abs=1e-4)
        assert len(set(found[name][:])) > 8
    assert found["prompt_ids"][:] == expected["prompt_ids"][:]


def test_a_step_runs_the_policy_once_and_no_reference(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = cached(tmp_path, tiny_model, parts())
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", None)
    passes: list[Any] = []
    trainer.model.model.register_forward_hook(lambda module, *rest: passes.append(module))
    trainer.train()
    assert (len(passes), trainer.ref_model) == (4, None)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"learning_rate": 1e-3},
        {"beta": 0.5},
        {"seed": 5},
        {"per_device_train_batch_size": 2},
        {"max_length": 500},
        {"ld_alpha": 0.0},
        {"output_dir": "another"},
    ],
    ids=str,
)
def test_settings_that_change_no_ids_need_no_model(
    change: dict[str, Any],
    parts: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL recomputes everything for most of these, and uses wrong sums for ld_alpha."""
    cached(tmp_path, tiny_model, parts(peft_config=LORA))
    monkeypatch.setattr("logratio.training.reference_scorer.load_model", None)
    monkeypatch.chdir(tmp_path)
    another = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = cached(tmp_path, tiny_model, parts(peft_config=another), **change)
    assert trainer.ref_model is None
    assert set(trainer.train_dataset.column_names) >= {"ref_chosen_logps", "ref_rejected_logps"}


@pytest.mark.parametrize(
    "change",
    [{"max_length": 7, "truncation_mode": "keep_end"}, {"max_length": 9}, {"bf16": True}],
    ids=str,
)
def test_settings_that_change_log_probs_never_use_old_ones(
    change: dict[str, Any], parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """TRL uses the old sums silently."""
    cached(tmp_path, tiny_model, parts())
    args = settings(tmp_path, precompute_ref_log_probs=True, **change)
    asked: dict[str, Any] = {"cache": tmp_path / "cache", "reference": tiny_model, "args": args}
    with pytest.raises(StaleCacheError, match=r"not in the cache; fill=True|compute_dtype"):
        CachedDPOTrainer(**asked, **parts())
    found = CachedDPOTrainer(**asked, fill=True, **parts()).train_dataset["ref_chosen_logps"][:]
    expected = DPOTrainer(args=args, **parts()).train_dataset["ref_chosen_logps"][:]
    assert found == pytest.approx(expected, abs=0.2 if "bf16" in change else 1e-4)


def test_new_data_is_evaluated_after_training(
    parts: Callable[..., Any], tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """TRL refuses, as it has no reference. The policy before training gives exactly ln 2."""
    trainer = cached(tmp_path, tiny_model, parts(eval_dataset={"held": Dataset.from_list(pairs)}))
    unseen = Dataset.from_list([{**pair, "prompt": "a" + pair["prompt"][3:]} for pair in pairs])
    before = trainer.evaluate(unseen)["eval_loss"]
    assert before == pytest.approx(LN_2, abs=1e-6)
    trainer.train()
    after = trainer.evaluate({"unseen": unseen, "seen": Dataset.from_list(pairs)})
    assert after["eval_seen_loss"] == pytest.approx(trainer.evaluate()["eval_held_loss"])
    expected = DPOTrainer(
        args=settings(tmp_path), **parts(model=trainer.model, ref_model=load(tiny_model))
    )
    assert after["eval_unseen_loss"] == pytest.approx(
        expected.evaluate(unseen)["eval_loss"], abs=1e-5
    )
    assert after["eval_unseen_loss"] < before


@pytest.mark.slow
def test_two_processes_share_one_cache_of_rows_in_memory(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    """With TRL the second process fails: it does not find the file of the first."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 16)
    expected = losses(DPOTrainer(args=settings(tmp_path), **parts()))
    worker = Path(__file__).parents[2] / "support" / "worker_cached_trainer.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", *map(str, (worker, tiny_model, pairs, tmp_path))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(worker.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first["processes"] == 2
    assert first["columns"] == second["columns"]
    assert len(set(first["columns"])) > 8
    assert_same(first["losses"], expected)


def test_rows_without_loss_tokens_sum_to_zero(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    cached(tmp_path, tiny_model, parts())
    options = {"max_length": 1, "truncation_mode": "keep_end"}
    trainer = cached(tmp_path, tiny_model, parts(), **options)
    assert not np.any(trainer.train_dataset["ref_chosen_logps"][:])


def test_stale_columns_are_replaced(
    parts: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    right = cached(tmp_path, tiny_model, parts()).train_dataset
    wrong = right.remove_columns("ref_chosen_logps").add_column("ref_chosen_logps", [0.0] * 16)
    again = cached(tmp_path, tiny_model, parts(train_dataset=wrong)).train_dataset
    assert again["ref_chosen_logps"][:] == right["ref_chosen_logps"][:]


@pytest.mark.parametrize(
    ("options", "more", "reason"),
    [
        ({"precompute_ref_log_probs": False}, {}, "precompute_ref_log_probs=True"),
        ({"fp16": True}, {}, "fp16"),
        ({}, {"ref_model": object()}, "leave ref_model out"),
        ({}, {"quantization_config": object()}, "quantized"),
    ],
)
def test_settings_that_cannot_use_a_cache_are_refused(
    options: dict[str, Any],
    more: dict[str, Any],
    reason: str,
    parts: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    args = settings(tmp_path, **{"precompute_ref_log_probs": True, **options})
    with pytest.raises(TrlError, match=reason):
        CachedDPOTrainer(cache=tmp_path, reference=tiny_model, args=args, **parts(**more))


def test_a_stream_is_refused(
    parts: Callable[..., Any], pairs: list[dict[str, str]], tiny_model: Path, tmp_path: Path
) -> None:
    stream = IterableDataset.from_generator(lambda: iter(pairs))
    with pytest.raises(TrlError, match="train dataset is a stream"):
        cached(tmp_path, tiny_model, parts(train_dataset=stream))


def test_another_version_of_trl_warns_or_is_refused() -> None:
    class Renamed:
        def compute_reference(self) -> None: ...

    check_trl(TESTED, DPOTrainer)
    with pytest.warns(UserWarning, match=r"trl 2\.0 is not tested"):
        check_trl("2.0", DPOTrainer)
    with pytest.raises(TrlError, match=r"trl 9\.9 has no Renamed\._precompute_ref_logps"):
        check_trl("9.9", Renamed)
