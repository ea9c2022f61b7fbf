"""The model card says how the model was made, and replaces no card of the user's."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs
from huggingface_hub import ModelCard

from logratio.training import LoraSettings, TrainConfig, TrainResult
from logratio.training.model_card import MARK, add_evaluation, hub_name
from logratio.training.trainer import DPOTrainer


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    """Four updates, each followed by an evaluation."""
    held = write_pairs(tmp_path / "held.jsonl", 36)
    settings: dict[str, Any] = {"batch_size": 4, "save_every": 0, "eval_every": 1}
    output = tmp_path / "out"
    return TrainConfig(tiny_model, [pairs_file], output, eval_data=held, lr=1e-3, **settings)


def with_(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def quiet(config: TrainConfig) -> TrainResult:
    return DPOTrainer(config=config, show_progress=False).train()


def card_of(config: TrainConfig) -> str:
    return (Path(config.output) / "README.md").read_text()


def tables(card: str) -> dict[str, str]:
    """All rows of the tables."""
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", card, re.M))


def test_it_says_how_the_model_was_made(config: TrainConfig) -> None:
    result = quiet(with_(config, beta=0.25, run_name="My | run"))
    card = card_of(config)
    rows, last = tables(card), result.evaluations[-1]
    assert "# My \\| run" in card
    assert "[DPO](https://arxiv.org/abs/2305.18290)" in card
    assert rows["β"] == "0.25"
    assert rows["groups"] == "16 kept of 16 rows (0 refused, 0 duplicates left out)"
    assert rows["updates"] == "4 of 4 groups each"
    low, high = last["accuracy_interval"]
    accuracy = f"{last['eval_rewards/accuracies']:.4g} (95 %: {low:.3f} to {high:.3f})"
    assert rows["preference accuracy"] == accuracy
    assert rows["loss"] == f"{last['eval_loss']:.4g}"
    assert (rows["lr"], rows["rules.max_length"]) == ("0.001", "1024")
    assert {"torch", "transformers", "logratio", "device"} <= rows.keys()


def test_the_hub_reads_it(config: TrainConfig) -> None:
    quiet(with_(config, lora=LoraSettings(rank=2), loss="ipo"))
    data: Any = ModelCard(card_of(config)).data
    assert data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["ipo", "logratio", "lora"],
    }


@pytest.mark.parametrize(
    ("file", "key"),
    [("config.json", "_name_or_path"), ("adapter_config.json", "base_model_name_or_path")],
)
def test_the_base_of_a_folder_is_the_id_that_it_records(
    tmp_path: Path, file: str, key: str
) -> None:
    for recorded, expected in (
        ("org/name", "org/name"),
        (str(tmp_path), None),
        ("model", None),
        ("../org/name", None),
        (3, None),
    ):
        (tmp_path / file).write_text(json.dumps({key: recorded}))
        assert hub_name(tmp_path) == expected
    (tmp_path / file).write_text("[")
    assert hub_name(tmp_path) is None


def test_the_base_in_the_cache_of_the_hub_is_its_id(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert hub_name(snapshot) == "org/name"


def test_settings_without_effect_are_not_on_it(config: TrainConfig) -> None:
    quiet(with_(config, max_steps=2, save_every=1))
    plain = tables(card_of(config)).keys()
    assert not {"gamma", "decay", "epochs", "max_new_tokens", "adapter", "save_every"} & plain
    assert not {"label_smoothing", "deterministic", "compile_layers"} & plain
    assert not {"reference_mixup_alpha", "reference_sync_steps", "parallel"} & plain
    assert not {"study_flipped_labels", "router_aux_loss_coef"} & plain
    assert {"max_steps", "min_lr_rate", "weight_decay", "eval_every", "rules.append_eos"} <= plain
    settings: dict[str, Any] = {"lr_scheduler": "wsd", "loss": "simpo", "label_smoothing": 0.1}
    quiet(with_(config, overwrite=True, **settings))
    assert {"gamma", "decay", "epochs", "label_smoothing"} <= tables(card_of(config)).keys()
    quiet(with_(config, overwrite=True, sync_reference=True, reference_sync_steps=1))
    moving = {"sync_reference", "reference_mixup_alpha", "reference_sync_steps"}
    assert moving <= tables(card_of(config)).keys()


def test_an_evaluation_is_added_once_and_never_to_a_card_of_the_users(
    config: TrainConfig,
) -> None:
    quiet(with_(config, eval_data=None, eval_every=None))
    row = {"step": 4, "groups": 9, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.5}
    output = Path(config.output)
    before = card_of(config)
    (output / "README.md").write_text(before.replace(MARK, ""))
    add_evaluation(output, row)
    assert card_of(config) == before.replace(MARK, "")
    (output / "README.md").write_text(before)
    for accuracy in (0.75, 0.5):
        add_evaluation(output, row | {"eval_rewards/accuracies": accuracy})
        card = card_of(config)
        assert tables(card)["preference accuracy"] == "0.75"
        assert card.index("## Training") < card.index("## Evaluation") < card.index("## Settings")
    add_evaluation(output / "nowhere", row)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in peft
def test_an_adapter_that_was_trained_further_is_an_adapter(
    config: TrainConfig, tmp_path: Path
) -> None:
    quiet(with_(config, lora=LoraSettings(rank=2)))
    further = with_(config, model=config.output, adapter="continue", output=tmp_path / "further")
    quiet(further)
    card = card_of(further)
    assert "library_name: peft" in card
    assert "AutoPeftModelForCausalLM" in card


# peft uses what transformers has renamed, which is warned of once in a process.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_its_code_loads_the_model(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, lora: LoraSettings | None
) -> None:
    quiet(with_(config, lora=lora))
    monkeypatch.chdir(Path(config.output).parent)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(config), re.S)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].num_parameters() > 0
    assert names["tokenizer"]("the cat")["input_ids"]


def test_it_describes_the_saved_model(config: TrainConfig) -> None:
    """With `best_metric` that is an earlier one; here each update makes the margin larger."""
    result = quiet(with_(config, best_metric="rewards/rejected", lr=1e-2))
    best = result.best_step
    assert best is not None
    assert f"after update {best}:" in card_of(config)
    assert tables(card_of(config))["updates"] == f"{best} of 4 groups each"


def test_no_path_of_the_machine_is_on_it(config: TrainConfig, tmp_path: Path) -> None:
    quiet(config)
    assert str(tmp_path) not in card_of(config)
    assert str(Path(config.model).parent) not in card_of(config)
    assert "pairs.jsonl" in card_of(config)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_a_card_of_the_users_is_kept(config: TrainConfig, lora: LoraSettings | None) -> None:
    config = with_(config, lora=lora)
    quiet(config)
    card = Path(config.output) / "README.md"
    assert MARK in card.read_text()
    again = with_(config, overwrite=True, beta=0.75)
    quiet(again)
    assert tables(card.read_text())["β"] == "0.75"
    card.write_text(card.read_text().replace(MARK, ""))
    quiet(with_(again, beta=0.5))
    assert tables(card.read_text())["β"] == "0.75"


def test_a_card_that_cannot_be_read_stops_no_run(config: TrainConfig) -> None:
    (Path(config.output) / "README.md").mkdir(parents=True)
    assert quiet(config).steps == 4
    assert (Path(config.output) / "README.md").is_dir()


def test_demonstrations_have_a_card(config: TrainConfig) -> None:
    quiet(with_(config, loss="sft"))
    card = card_of(config)
    assert "trained with supervised fine-tuning by" in card
    assert "| β |" not in card
