"""The arguments of the trainer as settings: objects, peft's config, and TRL's names."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from logratio.errors import ConfigError, SettingTypeError
from logratio.hub import local_folder
from logratio.synonyms import SAME
from logratio.training.config import TrainConfig, as_loss
from logratio.training.given_model import GivenModel
from logratio.training.lora import settings_of_peft
from logratio.training.methods.objective import named_methods
from logratio.training.model_arguments import given_policy, given_reference
from logratio.training.policy import TRAINED
from logratio.training.router_loss import coefficient_in_trl
from logratio.training.trl_settings import is_training_arguments, settings_of_trl
from logratio.validation import check_kind

TRL_NAMES: Mapping[str, str] = {
    "args": "config",
    "processing_class": "tokenizer",
    "ref_model": "reference",
    "train_dataset": "data",
}
"""Arguments of TRL's DPOTrainer with another name here; `synonyms` has the names of fields."""
_OF_TRAINER = ("model", "data", "reference", "eval_data", "tokenizer", "config")
"""Arguments that None leaves out."""
_UNSUPPORTED: Mapping[str, str] = {
    "data_collator": "remove it; batches are laid out from the tokenized data",
    "compute_metrics": "remove it; the metrics of every update are in metrics.jsonl",
    "optimizers": "choose optimizer, lr, lr_scheduler and warmup",
    "quantization_config": 'give the folder of a model, and quantization="4bit" or "8bit"',
}
"""Arguments of TRL's DPOTrainer without an equivalent, and what to do instead."""


def trainer_arguments(
    given: Mapping[str, Any], tokenizer: Any = None, peft_config: Any = None, config: Any = None
) -> tuple[TrainConfig, tuple[GivenModel, ...]]:
    """Combine the arguments of a trainer into its settings.

    Args:
        given: Fields of `TrainConfig` by any of their names; `model` and `reference` may be
            objects.
        tokenizer: See `given_policy`.
        peft_config: A `LoraConfig` of peft, or None.
        config: A complete `TrainConfig`; or a `DPOConfig` of TRL, whose fields come after those in
            `given`.

    Returns:
        The settings, with folders for all objects; and the objects, which must be kept as long as
        their folders are used.

    Raises:
        ConfigError, SettingTypeError, HubError: An argument cannot be used; the message names it.
    """
    named = _with_own_names(given, tokenizer=tokenizer, config=config)
    tokenizer, config = named.pop("tokenizer"), named.pop("config")
    if is_trl := is_training_arguments(config):
        named = settings_of_trl(config, named) | named
        config = None
    if config is not None:
        named = _fields_of(config, named)
    kind = type(config) if config is not None else TrainConfig
    models, folders = _folders(named, tokenizer)
    settings = named | folders
    if peft_config is not None:
        if settings.get("lora") is not None:
            raise ConfigError("lora and peft_config both describe the adapters: give one of them")
        methods = named_methods(as_loss(settings.get("loss", TrainConfig.loss)))
        rewards = any(method.scores for method, _ in methods.values())
        settings["lora"] = settings_of_peft(peft_config, _folder_of(settings), rewards=rewards)
    settings |= _of_object(models, settings, follows=is_trl)
    if is_trl and settings.get("router_aux_loss_coef", 0.0) is None:  # TRL's default
        settings["router_aux_loss_coef"] = coefficient_in_trl(_folder_of(settings))
    settings = _default_output(named) | settings
    return kind(**settings), tuple(models.values())


def _with_own_names(given: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """Rename TRL's arguments, and refuse those without an equivalent."""
    named = dict(own)
    for name, value in given.items():
        if name in _UNSUPPORTED:
            if value is not None and value != (None, None):
                raise ConfigError(f"DPOTrainer has no {name}: {_UNSUPPORTED[name]}")
            continue
        ours = _own_name(name)
        if value is None and ours in _OF_TRAINER:
            continue
        if named.get(ours) is not None:
            raise SettingTypeError(f"DPOTrainer: {name} means {ours}, which is given too")
        named[ours] = value
    return named


def _own_name(name: str) -> str:
    """Return the name here of an argument that decides which model or data is used."""
    field = SAME.get("--" + name.replace("_", "-"), "").removeprefix("--")
    return TRL_NAMES.get(name, field if field in ("model", "reference", "data") else name)


def _fields_of(config: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a complete config, with which no other setting may be given."""
    check_kind(config, TrainConfig)
    if taken := [name for name, value in others.items() if value is not None]:
        raise ConfigError(f"config holds all settings: leave {', '.join(taken)} out")
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _folders(
    settings: Mapping[str, Any], tokenizer: Any
) -> tuple[dict[str, GivenModel], dict[str, Any]]:
    """Give folders to objects; return them and the settings that name their folders."""
    model, reference = settings.get("model"), settings.get("reference")
    models: dict[str, GivenModel] = {}
    if model is None:
        raise ConfigError("DPOTrainer needs a model: a folder, a hub id, or a PreTrainedModel")
    if settings.get("data") is None:
        raise ConfigError(
            "DPOTrainer needs data: files, a list of dicts, a datasets.Dataset, or a table"
        )
    if reference is model and not isinstance(model, str | Path):
        raise ConfigError(
            "model and reference are the same object, which training changes: leave reference out, "
            "and a copy of the model is the reference"
        )
    if given := given_policy(model, tokenizer, settings.get("revision")):
        models["model"] = given
    if reference is not None and not isinstance(reference, str | Path):
        models["reference"] = given_reference(reference)
    folders: dict[str, Any] = {name: given.folder for name, given in models.items()}
    return models, folders | ({"revision": None} if "model" in models else {})


def _default_output(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the output folder if none is given: named after the model, as in TRL."""
    if {"output", "output_dir"} & settings.keys():
        return {}
    model = settings["model"]
    given = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    name = Path(str(given)).name.partition("@")[0]
    if not name:
        raise ConfigError("DPOTrainer needs an output folder: give output")
    return {"output": f"{name}-{'SFT' if settings.get('loss') == 'sft' else 'DPO'}"}


def _folder_of(settings: Mapping[str, Any]) -> Path:
    return local_folder(settings["model"], settings.get("revision"), weights=False)


def _of_object(
    models: Mapping[str, GivenModel], settings: Mapping[str, Any], *, follows: bool
) -> dict[str, Any]:
    """Return the settings that follow from a model in memory: its precision and its adapter.

    Args:
        models: The models in memory.
        settings: The other settings.
        follows: Autocast leaves bfloat16 weights as they are, as in transformers.
    """
    given = models.get("model")
    if given is None or given.model is None:
        return {}
    if settings.get("quantization") is not None:
        raise ConfigError("quantization applies while weights are loaded: give the model's folder")
    found: dict[str, Any] = {}
    continues = given.has_adapter and _continues(given, settings)
    unset = (None, "bf16") if follows else (None,)
    if settings.get("precision") in unset and given.base.dtype == torch.bfloat16:
        found["precision"] = "bf16-weights"
    if continues:
        _check_base(given)
        given.continue_adapter()
        return found | {"adapter": "continue"}
    lora = settings.get("lora")
    if given.has_adapter:
        adapter = next(iter(given.model.peft_config.values()))
        found["lora"] = lora = settings_of_peft(adapter, given.folder)
    if lora is None and not any(p.requires_grad for p in given.model.parameters()):
        raise ConfigError("no parameter of the model requires a gradient, so nothing is trained")
    if settings.get("cache") and settings.get("eval_samples") and not settings.get("reference"):
        raise ConfigError(
            "eval_samples draws from the reference too, and with a cache no copy of the model in "
            "memory is kept: give the reference's folder, or leave cache or eval_samples out"
        )
    if lora is not None:
        _check_base(given)
    return found


def _check_base(given: GivenModel) -> None:
    """Refuse a model with adapters that the saved adapter could not name as its base."""
    why = None
    if given.source is None:
        why = "was not loaded from a folder or a hub id"
    elif name := given.changed_weight():
        why = f"differs in {name} from {given.name}, from which it was loaded"
    if why:
        raise ConfigError(
            f"the adapter's base {why}, so the saved adapter could not name it: save it with "
            "model.save_pretrained(folder) and load it from there"
        )


def _continues(given: GivenModel, settings: Mapping[str, Any]) -> bool:
    """Check the adapter of a peft model; return whether it is trained further.

    A new adapter adds nothing to its base, so the run is one with `lora`.
    """
    adapters = given.model.peft_config
    kinds = [getattr(one.peft_type, "value", one.peft_type) for one in adapters.values()]
    if other := next((kind for kind in kinds if kind != "LORA"), None):
        raise ConfigError(
            f"the model has an adapter of type {other}, and only LoRA adapters are trained: pass "
            "the base model, with a LoraConfig as peft_config or without an adapter"
        )
    if [*adapters] != [TRAINED]:
        raise ConfigError(
            f"the model has the adapters {', '.join(adapters)}: keep one, named {TRAINED}"
        )
    if settings.get("lora") is not None:
        raise ConfigError(
            "the model is a peft model already: leave peft_config and lora out, or pass "
            "model.merge_and_unload() to add another adapter"
        )
    weights = given.model.named_parameters()
    is_new = not any(bool(weight.any()) for name, weight in weights if "lora_B" in name)
    return settings.get("adapter") == "continue" or not is_new
