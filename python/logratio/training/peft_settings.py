"""A config object of peft, as the settings of new adapters."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from logratio.errors import ConfigError, SettingTypeError
from logratio.training.config import LoraSettings

NAMES: Mapping[str, str] = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
}
"""Fields of peft's LoraConfig, and the settings with the same meaning."""
WITHOUT_EFFECT = {
    *("task_type", "peft_type", "base_model_name_or_path", "revision", "peft_version"),
    *("inference_mode", "auto_mapping", "fan_in_fan_out", "runtime_config", "megatron_core"),
}
"""Fields that peft sets, or that change nothing in a run."""


def lora_settings(given: Any, folder: Path) -> LoraSettings:
    """Return the settings of the adapters that a `LoraConfig` of peft describes.

    Args:
        given: The config. Its default for `target_modules` depends on the model, as in peft.
        folder: Folder of the model that gets the adapters.

    Raises:
        SettingTypeError: `given` is not a `LoraConfig`.
        ConfigError: A field has no equivalent here and differs from peft's default; the message
            names it.
    """
    from peft import LoraConfig

    if not isinstance(given, LoraConfig):
        raise SettingTypeError(
            f"peft_config must be a LoraConfig of peft, not {type(given).__name__}"
        )
    if given.task_type not in (None, "CAUSAL_LM"):
        raise ConfigError(f"peft_config: task_type {given.task_type} is not CAUSAL_LM")
    if refused := [*_unsupported(given)]:
        raise ConfigError(
            f"peft_config: {', '.join(refused)} has no equivalent here; leave it at peft's default"
        )
    values = {ours: getattr(given, name) for name, ours in NAMES.items()}
    return LoraSettings(**values | {"targets": _targets(given.target_modules, folder)})


def _unsupported(given: Any) -> Iterator[str]:
    """Yield the fields that change the adapters and have no setting here."""
    for field in fields(given):
        if field.name in NAMES or field.name in WITHOUT_EFFECT:
            continue
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        if (value := getattr(given, field.name)) != made:
            yield f"{field.name}={value!r}"


def _targets(given: Any, folder: Path) -> tuple[str, ...]:
    """Return the names of the modules to adapt; empty for all linear layers except the head."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if given == "all-linear":
        return ()
    if isinstance(given, str):
        raise ConfigError(
            f"peft_config: target_modules {given!r} is a pattern: list the names of the modules, "
            'or write "all-linear"'
        )
    if given is None:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        given = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if given is None:
            raise ConfigError(
                f"peft_config: peft has no default target_modules for {kind}: list their names, or "
                'write "all-linear"'
            )
    return tuple(sorted(given))
