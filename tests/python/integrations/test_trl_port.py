"""A script of TRL gives the same losses here, and each field of DPOConfig is explained."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from repository import ROOT
from tiny_models import WORDS, tiny, word_tokenizer
from transformers import AutoTokenizer
from trl import DPOConfig
from trl_trainers import load
from trl_trainers import pairs as pairs

import logratio
from logratio.errors import ConfigError, SettingTypeError
from logratio.training.config import TrainConfig
from logratio.training.trl_settings import settings_of_trl

# Warnings of TRL and its dependencies are not under test.
pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (ROOT / "python" / "docs" / "migrating.md").read_text()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disable the progress bars of transformers and datasets."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


def args_of(folder: Path, **more: Any) -> DPOConfig:
    """Return arguments with which each update has all sixteen pairs, whatever their order."""
    usual: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "bf16": False,
        "disable_tqdm": True,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return DPOConfig(**(usual | more))


ONE_BATCH = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}


def logged(trainer: Any) -> list[float]:
    """Return the loss of each update of TRL's trainer or of ours."""
    trainer.train()
    if isinstance(trainer, trl.DPOTrainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    path = Path(trainer.config.output) / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def both(
    source: Path, pairs: list[dict[str, str]], folder: Path, options: dict[str, Any], **more: Any
) -> tuple[list[float], list[float]]:
    """Return the losses of TRL's trainer and of ours, from the same arguments."""
    found = []
    for kind in (trl.DPOTrainer, logratio.DPOTrainer):
        arguments = {
            "model": load(source),
            "args": args_of(folder / kind.__module__, **options),
            "processing_class": AutoTokenizer.from_pretrained(source),
            "train_dataset": Dataset.from_list(pairs),
        }
        made = {name: make() for name, make in more.items()}
        found.append(logged(kind(**arguments | made)))
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "beta": 0.5},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"loss_type": "ipo", "lr_scheduler_type": "constant", "optim": "adamw_torch"},
        {"max_grad_norm": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-4},
        {"precompute_ref_log_probs": True, "max_length": 12},
        {"loss_type": ["sigmoid", "hinge", "ipo"], "loss_weights": [0.8, 0.2, 0.01]},
        {"loss_type": ["robust", "hinge"], "label_smoothing": 0.1},
        *(
            {"loss_type": kind, "label_smoothing": 0.2, **ONE_BATCH}
            for kind in ("aot", "aot_unpaired")
        ),
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-3}},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 3, "min_lr_ratio": 0.1},
        },
        {"gradient_checkpointing": False, "padding_free": False, "pad_to_multiple_of": 8},
    ],
    ids=str,
)
def test_the_same_arguments_give_the_losses_of_trl(
    options: dict[str, Any], tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    expected, found = both(tiny_model, pairs, tmp_path, options)
    assert len(expected) == options.get("max_steps", 4)
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-2


def test_a_reference_model_gives_the_losses_of_trl(
    tiny_model: Path, make_model: Any, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    other = make_model("other", seed=3)
    expected, found = both(tiny_model, pairs, tmp_path, {}, ref_model=lambda: load(other))
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - 0.693147) > 0.01


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_peft_model_gives_the_losses_of_trl(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path, is_trained: bool
) -> None:
    """The reference of a trained adapter is the adapter at the start."""

    def wrapped() -> Any:
        torch.manual_seed(1)
        settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load(tiny_model), settings)
        for name, weight in model.named_parameters():
            if is_trained and "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        return model

    expected, found = both(tiny_model, pairs, tmp_path, {}, model=wrapped)
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-2


def test_the_scripts_of_the_page_agree(
    make_model: Any,
    pairs: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_model("model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    scripts = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(scripts) == 3
    runs = []
    for script in scripts:
        names: dict[str, Any] = {}
        exec(script, names)
        trainer = names["trainer"]
        is_trl = isinstance(trainer, trl.DPOTrainer)
        history = trainer.state.log_history if is_trl else names["result"].history
        runs.append([entry["loss"] for entry in history if "loss" in entry])
    expected, *ours = runs
    assert len(expected) == 3
    assert expected[-1] < expected[0] - 1e-3
    assert all(found == pytest.approx(expected, abs=1e-5) for found in ours)
    changed = [a for a, b in zip(*(s.splitlines() for s in scripts[:2]), strict=False) if a != b]
    assert changed[0] == "from trl import DPOConfig, DPOTrainer"


@pytest.mark.parametrize("name", [field.name for field in fields(DPOConfig)])
def test_the_page_has_every_field(name: str) -> None:
    assert re.search(rf"`{name}(=[^`]*)?`", PAGE.partition("## Fields of DPOConfig")[2])


REFUSED: dict[str, Any] = {
    "dataloader_drop_last": True,
    "disable_dropout": False,
    "eval_on_start": True,
    "label_smoothing": 0.1,
    "label_smoothing_factor": 0.1,
    "loss_type": ["sigmoid", "sft"],
    "loss_type=aot": "aot",
    "fsdp_config": {"cpu_offload": True},
    "lr_scheduler_type": "polynomial",
    "max_length": None,
    "model_init_kwargs": {"device_map": "auto"},
    "neftune_noise_alpha": 5.0,
    "num_train_epochs": 0.5,
    "optim": "sgd",
    "push_to_hub": True,
    "resume_from_checkpoint": "run/checkpoint-4",
    "train_sampling_strategy": "sequential",
    "truncation_mode": "keep_end",
    "trust_remote_code": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_changes_the_result_is_refused_by_name(name: str, tmp_path: Path) -> None:
    field, value = name.partition("=")[0], REFUSED[name]
    more = {"fsdp": True} if field == "fsdp_config" else {}
    with pytest.raises(ConfigError, match=rf"args: .*{field}="):
        settings_of_trl(args_of(tmp_path, **{field: value}, **more), {})


def test_offloaded_shards_are_refused_with_the_reason(tmp_path: Path) -> None:
    given = args_of(tmp_path, fsdp=True, fsdp_config={"cpu_offload": True})
    with pytest.raises(ConfigError, match="shards on the host would train on CPUs; use more proc"):
        settings_of_trl(given, {})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"epochs": 4, "batch_size": 16, "seed": 42, "warmup": 0.0, "save_every": 0}),
        ({"bf16": True}, {"precision": "bf16"}),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, {"precision": "bf16-weights"}),
        ({"model_init_kwargs": {"dtype": torch.bfloat16, "revision": "v1"}}, {"revision": "v1"}),
        ({"max_steps": 30, "warmup_steps": 7}, {"max_steps": 30}),
        ({"warmup_steps": 0.1}, {"warmup": 0.1}),
        ({"warmup_steps": 10}, {"warmup": 10.0}),
        ({"loss_type": ["sigmoid", "hinge"]}, {"loss": "dpo+hinge"}),
        ({"loss_type": ["sigmoid"], "loss_weights": [0.5]}, {"loss": "dpo:0.5"}),
        ({"save_strategy": "steps", "save_steps": 7}, {"save_every": 7}),
        ({"save_total_limit": 3, "torch_compile": False}, {"keep_checkpoints": 3}),
        ({"resume_from_checkpoint": "True"}, {"resume": True}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"lr_scheduler": "constant"}),
        ({"optim": "adamw_bnb_8bit"}, {"optimizer": "adamw8bit"}),
    ],
    ids=str,
)
def test_fields_become_settings(
    options: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = settings_of_trl(args_of(tmp_path, **options), {})
    assert {name: found[name] for name in expected} == expected
    assert TrainConfig("model", "data", **found).output == str(tmp_path / "run")


def test_an_update_has_the_pairs_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = args_of(tmp_path)
    ranks = {"RANK": "1", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert settings_of_trl(args, {})["batch_size"] == 8 * 2 * 6


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"fsdp": True}, "fsdp"),
        ({"fsdp": "full_shard auto_wrap"}, "fsdp"),
        ({"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": False}}, "fsdp"),
        ({"fsdp": ["hybrid_shard"]}, "hsdp"),
        ({"fsdp": "no_shard"}, "ddp"),
        ({}, "auto"),
    ],
    ids=str,
)
def test_fsdp_divides_the_model_over_several_processes(
    fields: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strings and lists are those of older versions of transformers, which kept them."""
    args = args_of(tmp_path)
    for name, value in fields.items():
        setattr(args, name, value)
    assert "parallel" not in settings_of_trl(args, {})
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig("model", "data", **settings_of_trl(args, {}))
    assert config.parallel == expected


def test_trackers_are_carried_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"report_to", "run_name", "project"}
    assert not names & settings_of_trl(args_of(tmp_path, report_to="none"), {}).keys()
    args = args_of(tmp_path, report_to=["wandb", "comet_ml"], run_name="first", project="mine")
    found = settings_of_trl(args, {})
    assert [found[name] for name in ("report_to", "run_name", "project")] == [
        *(["wandb"], "first", "mine"),
    ]
    assert "report_to: comet_ml is not supported" in capsys.readouterr().err


@pytest.mark.parametrize("steps", range(1, 30))
def test_a_number_of_warmup_updates_is_exact(steps: int, tmp_path: Path) -> None:
    from logratio.training.schedule import learning_rate

    args = args_of(tmp_path, max_steps=30, warmup_steps=steps, learning_rate=1.0)
    config = TrainConfig("model", "data", **settings_of_trl(args, {}))
    rates = [learning_rate(config, done, 30) for done in range(30)]
    assert rates.index(max(rates)) == steps - 1
    assert rates[steps] == 1.0


@pytest.mark.parametrize(
    ("fields", "loss", "options"),
    [
        ({"loss_type": "exo_pair", "label_smoothing": 0.2}, "exo", {}),
        ({"loss_type": "robust", "label_smoothing": 0.2}, "robust", {}),
        ({"loss_type": "sppo_hard"}, "sppo", {}),
        ({"loss_type": "discopop", "discopop_tau": 0.1}, "discopop", {"tau": 0.1}),
        ({"f_divergence_type": "js_divergence"}, "f-dpo-js", {}),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
            "f-dpo-alpha",
            {"alpha": 0.7},
        ),
        ({"ld_alpha": 0.4}, "ld-dpo", {"alpha": 0.4}),
        ({"use_weighting": True}, "wpo", {}),
    ],
)
def test_losses_of_trl_are_methods(
    fields: dict[str, Any], loss: str, options: dict[str, float], tmp_path: Path
) -> None:
    config = TrainConfig("model", "data", **settings_of_trl(args_of(tmp_path, **fields), {}))
    assert config.loss == loss
    assert config.loss_options == pytest.approx(options)
    assert config.label_smoothing == fields.get("label_smoothing")


def test_settings_of_the_call_take_precedence(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    rules = logratio.TokenizationRules(max_length=64)
    args = args_of(tmp_path, max_length=None)
    trainer = logratio.DPOTrainer(tiny_model, pairs, args=args, rules=rules, beta=0.7)
    assert (trainer.config.rules.max_length, trainer.config.beta) == (64, 0.7)
    args = args_of(tmp_path, loss_type="bco_pair", label_smoothing=0.2)
    with pytest.raises(ConfigError, match="loss_type=bco_pair has no equivalent here: choose"):
        logratio.DPOTrainer(tiny_model, pairs, args=args)
    smooth: dict[str, Any] = {"loss": "dpo", "label_smoothing": 0.1, "dry_run": True}
    trainer = logratio.DPOTrainer(tiny_model, pairs, args=args, **smooth)
    assert (trainer.config.loss, trainer.config.label_smoothing) == ("dpo", 0.1)


def test_arguments_without_an_equivalent_are_refused(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": tiny_model, "args": args_of(tmp_path), "train_dataset": pairs}
    for name in ("data_collator", "compute_metrics", "quantization_config"):
        with pytest.raises(ConfigError, match=f"DPOTrainer has no {name}: "):
            logratio.DPOTrainer(**given | {name: object()})
    with pytest.raises(SettingTypeError, match="train_dataset means data, which is given too"):
        logratio.DPOTrainer(data=pairs, **given)
    trainer = logratio.DPOTrainer(**given, data_collator=None, optimizers=(None, None))
    assert trainer.updates == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bias": "all"}, "peft_config: bias"),
        ({"init_lora_weights": "pissa"}, "init 'pissa' is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "peft_config: rank_pattern"),
        ({"target_modules": ".*_proj"}, "is a pattern"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"target_modules": ["q_porj"]}, "'q_porj' matches no layer"),
    ],
    ids=str,
)
def test_fields_of_a_peft_config_are_refused_by_name(
    change: dict[str, Any],
    named: str,
    tiny_model: Path,
    pairs: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    settings = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **change})
    with pytest.raises(ConfigError, match=re.escape(named)):
        logratio.DPOTrainer(tiny_model, pairs, peft_config=settings, output=tmp_path / "o")


def test_a_peft_config_keeps_pefts_defaults(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    trainer = logratio.DPOTrainer(
        tiny_model, pairs, peft_config=LoraConfig(), output=tmp_path, dry_run=True
    )
    wanted: Any = get_peft_model(load(tiny_model), LoraConfig()).peft_config["default"]
    lora = trainer.config.lora
    assert lora is not None
    assert (lora.rank, lora.alpha) == (wanted.r, wanted.lora_alpha)
    assert set(lora.targets) == set(wanted.target_modules)


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_a_mixture_of_experts_gives_the_losses_of_trl(
    coefficient: float | None, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """One micro-batch an update: TRL's loss is that of a micro-batch, ours that of an update."""
    fields = {"vocab_size": len(WORDS), "router_aux_loss_coef": 0.3, "pad_token_id": 0}
    tiny(FAMILIES["mixtral"].config(**fields), scale=2.0).save_pretrained(tmp_path / "mixtral")
    word_tokenizer().save_pretrained(tmp_path / "mixtral")
    options = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    found = []
    for kind in (trl.DPOTrainer, logratio.DPOTrainer):
        trainer: Any = kind(
            model=load(tmp_path / "mixtral"),
            args=args_of(tmp_path / kind.__module__, router_aux_loss_coef=coefficient, **options),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "mixtral"),
            train_dataset=Dataset.from_list(pairs),
        )
        result = trainer.train()
        is_ours = kind is logratio.DPOTrainer
        found.append(result.history if is_ours else trainer.state.log_history[:4])
    assert trainer.config.router_aux_loss_coef == (coefficient or 0.3)
    for expected, ours in zip(*found, strict=True):
        assert ours["aux_loss"] == pytest.approx(expected["aux_loss"], abs=5e-5)
        whole = ours["loss"] + trainer.config.router_aux_loss_coef * ours["aux_loss"]
        assert whole == pytest.approx(expected["loss"], abs=5e-5)
    assert abs(ours["aux_loss"] - found[1][0]["aux_loss"]) > 1e-3


def test_held_out_data_is_evaluated_as_in_trl(
    tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "num_train_epochs": 5,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "eval_rewards/accuracies",
    }
    found = []
    held: Any = Dataset.from_list([{**one, "prompt": one["prompt"] + " loud"} for one in pairs])
    for kind in (trl.DPOTrainer, logratio.DPOTrainer):
        trainer: Any = kind(
            model=load(tiny_model),
            args=args_of(tmp_path / kind.__module__, **options),
            processing_class=AutoTokenizer.from_pretrained(tiny_model),
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=held,
        )
        result = trainer.train()
        rows = result.evaluations if kind is logratio.DPOTrainer else trainer.state.log_history
        found.append([row["eval_loss"] for row in rows if "eval_loss" in row])
    expected, ours = found
    assert ours[: len(expected)] == pytest.approx(expected, abs=1e-5)
    assert len(expected) >= 2
    assert trainer.config.best_metric == "eval_rewards/accuracies"


@pytest.mark.parametrize(
    "change", [{"eval_steps": 0.5}, {"greater_is_better": True, "load_best_model_at_end": True}]
)
def test_evaluations_without_an_equivalent_are_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = args_of(tmp_path, **options | change)
    with pytest.raises(ConfigError, match=f"args: {next(iter(change))}="):
        settings_of_trl(args, {"eval_dataset": [{}]})
