"""Scripts of transformers and TRL: what they call, and what they pass, works or is explained."""

from collections.abc import Callable as Function
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import transformers
from conftest import write_pairs
from safetensors.torch import load_file
from trl import DPOConfig

from logratio import Callback, DPOTrainer
from logratio.errors import ConfigError, LogratioError, SettingTypeError
from logratio.training import LoraSettings, TrainResult
from logratio.training.trainer_methods import NoSuchAttributeError


class Run(NamedTuple):
    """A run that has ended, its callback, and the working directory that it had."""

    trainer: DPOTrainer
    result: TrainResult
    counting: "Counting"
    folder: Path


class Counting(Callback):
    """Counts the updates."""

    updates = 0

    def on_update(self, state: Any, metrics: Any) -> None:
        self.updates += 1


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trainer after three updates with an evaluation each, in a folder named after the model."""
    folder, counting = tmp_path_factory.mktemp("run"), Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_pairs(folder / "pairs.jsonl", 20)
        trainer = DPOTrainer(
            tiny_model,
            "pairs.jsonl",
            callbacks=counting,
            show_progress=False,
            eval_share=0.2,
            eval_every=1,
            best_metric="loss",
            report=False,
            batch_size=4,
            max_steps=3,
            lr=1e-2,
        )
        result = trainer.train()
    return Run(trainer, result, counting, folder)


def test_without_an_output_folder_it_is_named_after_the_model(
    trained: Run, tiny_model: Path
) -> None:
    assert str(trained.result.output) == f"{tiny_model.name}-DPO"


def test_one_callback_needs_no_list(trained: Run) -> None:
    trainer, result, counting, _ = trained
    assert counting.updates == result.steps == 3
    assert trainer.callbacks == (counting,)


def test_save_model_copies_the_model_and_no_record_of_the_run(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, result = trained.trainer, trained.result
    monkeypatch.chdir(trained.folder)
    trainer.save_model()
    trainer.save_model(tmp_path / "new" / "copy")
    copied = {path.name for path in (tmp_path / "new" / "copy").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.json"} <= copied
    assert not {"metrics.jsonl", "evaluations.jsonl", "run_info.json"} & copied
    weights = load_file(tmp_path / "new" / "copy" / "model.safetensors")
    assert weights.keys() == load_file(result.output / "model.safetensors").keys()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "copy")
    assert model.num_parameters() > 0


def test_evaluate_returns_the_metrics_of_the_saved_model(
    trained: Run,
) -> None:
    trainer, result = trained.trainer, trained.result
    found = trainer.evaluate()
    assert found["step"] == result.best_step
    assert found["eval_loss"] == min(row["eval_loss"] for row in result.evaluations)


def test_log_history_has_the_rows_and_names_of_transformers(
    trained: Run,
) -> None:
    trainer, result = trained.trainer, trained.result
    rows = trainer.state.log_history
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == [row["loss"] for row in result.history]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert [row["learning_rate"] for row in rows if "loss" in row] == [
        row["lr"] for row in result.history
    ]
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [
        row["eval_loss"] for row in result.evaluations
    ]
    assert (trainer.state.global_step, trainer.state.max_steps) == (3, 3)
    assert trainer.model is trainer.state.policy


@pytest.fixture
def make(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Function[..., DPOTrainer]:
    """Make a trainer that writes nothing."""

    def made(**settings: Any) -> DPOTrainer:
        given = {"model": tiny_model, "data": pairs_file, "output": tmp_path / "out"} | settings
        return DPOTrainer(**given, dry_run=True, show_progress=False)

    return made


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.save_model("x"), r"save_model\(\) needs a trained model: call train\(\)"),
        (lambda one: one.evaluate(), r"evaluate\(\) needs a trained model"),
        (lambda one: one.evaluate([{}]), r"evaluate other data with logratio\.evaluate"),
        (
            lambda one: one.push_to_hub(),
            r"upload the output folder with `hf upload ORG/NAME .*out`",
        ),
        (lambda one: one.state, r"DPOTrainer\.state exists once train\(\) has started"),
        (lambda one: one.model, r"DPOTrainer\.model exists once train\(\) has started"),
        (lambda one: one.add_callback, "has no add_callback: pass callbacks to DPOTrainer"),
        (lambda one: one.predict, r"has no predict: use logratio\.evaluate"),
        (lambda one: one.nonsense, "DPOTrainer has no nonsense$"),
    ],
)
def test_what_cannot_be_called_names_what_to_do(
    make: Function[..., DPOTrainer], call: Function[[Any], Any], message: str
) -> None:
    with pytest.raises(LogratioError, match=message):
        call(make())
    assert not hasattr(make(), "state")
    assert issubclass(NoSuchAttributeError, AttributeError)


def test_no_callbacks_may_be_none(make: Function[..., DPOTrainer]) -> None:
    assert make(callbacks=None).callbacks == ()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Counting], r"pass an instance, Counting\(\), not the class"),
        ([transformers.EarlyStoppingCallback(3)], "set early_stop and best_metric"),
        (5, "not int: derive from it; its methods are on_start"),
        ([transformers.TrainerCallback], "not TrainerCallback: derive from it"),
    ],
)
def test_other_callbacks_are_refused(
    make: Function[..., DPOTrainer], callbacks: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(callbacks=callbacks)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": None}, "DPOTrainer needs data: files, a list of dicts"),
    ({"per_device_train_batch_size": 4}, "set `batch_size`, the number of pairs in an update"),
    ({"gradient_accumulation_steps": 4}, "set `batch_size`, the number of pairs in an update"),
    ({"eval_strategy": "steps"}, "give `eval_data=…` or `eval_share=0.05`"),
    ({"peft_config": peft.IA3Config()}, "not IA3Config: only LoRA adapters are trained: give"),
    ({"peft_config": {"r": 2}}, r"write LoraConfig\(\*\*peft_config\)"),
    ({"peft_config": peft.AdaLoraConfig(total_step=9)}, "ADALORA is not supported: give a plain"),
    ({"lora_target_modules": ["q_proj"]}, r"write lora=LoraSettings\(target_modules=…\)"),
    ({"data": [{"prompt": "a"}, 3]}, r"row 2 of the list is an int, not a dict"),
    ({"data": [["a", "b"]]}, r"item 1 of the list is a list"),
    ({"data": {"prompt": ["a"]}}, r"a dict is one row: put it into a list"),
    ({"data": [{"prompt": "a", "chosen": 3, "rejected": "b"}]}, r":1 \[E203\] 'chosen' is a num"),
    ({"data": [{"prompt": "a", "chosen": "b"}]}, r":1 \[E201\] the key 'rejected' is missing"),
    ({"data": [{1: "a"}]}, r":1 \[E203\] the key 1 is not a string"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_arguments_are_refused_with_the_remedy(
    make: Function[..., DPOTrainer], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(LogratioError, match=message):
        make(**settings)


@pytest.mark.filterwarnings("ignore")  # of peft, about the tiny model
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (peft.IA3Config(task_type="CAUSAL_LM"), "IA3"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
    ],
)
def test_a_model_with_another_adapter_is_refused(
    make: Function[..., DPOTrainer], tiny_model: Path, kind: Any, name: str
) -> None:
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model = peft.get_peft_model(base, kind)
    with pytest.raises(ConfigError, match=f"adapter of type {name}, and only LoRA"):
        make(model=model)


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"eval_strategy": "epoch"}, "eval_strategy='epoch' needs held-out data: give eval_dataset"),
    ({"loss_type": ["sigmoid", "sft"]}, "has no equivalent here: choose from"),
    ({"neftune_noise_alpha": 1.0}, "embeddings get no noise"),
    ({"push_to_hub": True}, "`hf upload ORG/NAME FOLDER`"),
    ({"optim_args": "a=1"}, "use `adam_epsilon=…`"),
    ({"lr_scheduler_type": "polynomial"}, "choose constant, cosine, linear"),
    ({"dataloader_drop_last": True}, "every epoch has all groups"),
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL sets it
@pytest.mark.parametrize(("field", "message"), FIELDS)
def test_a_field_of_trl_is_refused_with_the_reason(
    make: Function[..., DPOTrainer], tmp_path: Path, field: dict[str, Any], message: str
) -> None:
    args = DPOConfig(output_dir=str(tmp_path / "o"), bf16=False, use_cpu=True, **field)
    with pytest.raises(ConfigError, match=message):
        make(output=None, args=args)


def test_a_name_of_all_linear_layers_is_that_of_peft() -> None:
    assert LoraSettings(targets=("all-linear",)) == LoraSettings()
    with pytest.raises(SettingTypeError, match="targets must be a list"):
        LoraSettings(targets="q_proj")  # type: ignore[arg-type]
