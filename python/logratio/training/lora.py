"""LoRA adapters: their settings as peft's config, the checks of both, and their dropout."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from logratio.errors import ConfigError, SettingTypeError
from logratio.logps.scores import HEAD, has_scalar_head
from logratio.training.config import CHANGING_INITS, LoraSettings, PathLike, TrainConfig
from logratio.training.methods.objective import Objective
from logratio.training.models import (
    ADAPTER_CONFIG,
    base_folder,
    check_quantization,
    is_quantized,
    precision_of,
    quietly,
)
from logratio.training.reward_model import TASK, empty_model, is_reward_model
from logratio.validation import PATH, check_argument

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)
"""Layers that can have an adapter."""


def with_lora(model: nn.Module, settings: LoraSettings, folder: Path) -> nn.Module:
    """Add new LoRA adapters to the model of `folder`; initially they do not change its output.

    The result is in eval mode: see `use_dropout`.
    """
    from peft import get_peft_model

    with quietly():
        wrapped = get_peft_model(model, _peft_config(settings, rewards=has_scalar_head(model)))
    # An absolute path lets the saved adapter find its base from any working directory.
    wrapped.peft_config["default"].base_model_name_or_path = str(folder.resolve())
    widen_saved_modules(wrapped)
    adapted: nn.Module = wrapped.eval()
    return adapted


def _peft_config(settings: LoraSettings, *, rewards: bool) -> Any:
    """Return peft's config of new adapters; peft trains a reward model's scalar head whole."""
    from peft import LoraConfig

    saved = [name for name in settings.modules_to_save if not (rewards and name == HEAD)]
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft scales by any number
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or "all-linear",
        modules_to_save=saved or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init == "default" else settings.init,
        task_type=TASK if rewards else "CAUSAL_LM",
    )


def widen_saved_modules(model: Any) -> bool:
    """Store the trained copies of layers in float32, like all trained weights under autocast.

    Under "bf16-weights" the body computes in bfloat16 without autocast and accepts no float32
    input, so the copies stay in bfloat16; the optimizer keeps float32 copies of them.

    Returns:
        Whether a copy was in a lower precision before.
    """
    from peft.utils import ModulesToSaveWrapper

    if all(p.dtype == torch.bfloat16 for p in model.get_input_embeddings().parameters()):
        return False
    wrappers = (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    copies = [wrapper.modules_to_save for wrapper in wrappers]
    low = [copy for copy in copies if any(p.dtype != torch.float32 for p in copy.parameters())]
    for copy in low:
        copy.float()
    return bool(low)


def use_dropout(policy: nn.Module) -> None:
    """Put the dropout of LoRA adapters in training mode; every other module stays in eval mode.

    The `evaluating` context of `training.reference` turns it off for a pass.
    """
    from peft.tuners.lora import LoraLayer

    for layer in policy.modules():
        if isinstance(layer, LoraLayer):
            drops = [d for d in layer.lora_dropout.values() if isinstance(d, nn.Dropout) and d.p]
            for module in (*drops, *([layer] if drops else [])):  # DoRA reads the layer's mode
                module.training = True


def check_adapters(config: TrainConfig) -> None:
    """Check the settings of a run's adapters and of their base, without loading weights.

    Raises:
        ConfigError: The settings do not fit the folder of the model, a number is out of range, or
            a name matches no suitable layer; the message names the setting.
        QuantizationError: `quantization` is set and the base is already quantized.
        MissingExtraError: `quantization` is set and bitsandbytes is not installed.
    """
    model, is_adapter = config.model, (Path(config.model) / ADAPTER_CONFIG).exists()
    if config.lora and is_adapter:
        raise ConfigError(
            f"{model} is itself an adapter: train it further with --adapter continue, or create a "
            f"whole model with `logratio merge --model {model} --output WHOLE` and add a new "
            "adapter to that"
        )
    if config.adapter == "continue":
        _check_continued(Path(model), is_adapter=is_adapter)
    _check_base(config)
    if config.lora:
        _check_settings(config.lora, config)


def _check_continued(folder: Path, *, is_adapter: bool) -> None:
    """Refuse to train further what is not a LoRA adapter over an unchanged base."""
    if not is_adapter:
        raise ConfigError(
            f"--adapter continue: {folder} is not an adapter; give --lora for a new one"
        )
    settings = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    kind, bias = settings.get("peft_type"), settings.get("bias", "none")
    init = settings.get("init_lora_weights", True)
    name = init.partition("_niter")[0] if isinstance(init, str) else init
    why = None
    if kind != "LORA":
        why = f"adapters of type {kind} are not supported"
    elif bias != "none":
        why = f"it trains biases of the base (bias {bias!r}), which exist only once"
    elif name in CHANGING_INITS:
        why = f"its init_lora_weights {init!r} would change the base's weights again"
    if why:
        raise ConfigError(f"--adapter continue: {folder} cannot be trained further: {why}")


def _check_base(config: TrainConfig) -> None:
    """Refuse to train quantized weights; only adapters over them can be trained."""
    base = base_folder(config.model)
    if not config.trains_adapter and (config.quantization or is_quantized(base)):
        bits = config.quantization
        what = f"--quantization {bits}" if bits else f"{base} is quantized"
        raise ConfigError(
            f"{what}: quantized weights cannot be trained; train adapters over them with --lora"
        )
    check_quantization(base, config.quantization)
    if config.quantization == "8bit" and _uses_dora(config):
        raise ConfigError(
            "--quantization 8bit with DoRA: peft's DoRA loses the scales of bitsandbytes' 8-bit "
            "weights on a CPU, and was not tested elsewhere; choose 4bit, or leave DoRA out"
        )
    if config.quantization and config.reference:
        check_quantization(base_folder(config.reference), config.quantization)


def _uses_dora(config: TrainConfig) -> bool:
    if config.lora:
        return config.lora.use_dora
    settings = json.loads((Path(config.model) / ADAPTER_CONFIG).read_text("utf-8"))
    return bool(settings.get("use_dora"))


def _check_settings(settings: LoraSettings, config: TrainConfig) -> None:
    """Check the settings of new adapters."""
    if settings.init == "orthogonal":
        _check_orthogonal(settings, config)
    if settings.targets or settings.modules_to_save:
        model = without_weights(config.model, rewards=Objective.of(config).scores)
        _check_targets(settings.targets, model, config.model)
        _check_saved_modules(settings, model, config.model)


def _check_orthogonal(settings: LoraSettings, config: TrainConfig) -> None:
    if settings.rank % 2:
        raise ConfigError(f"--lora-init orthogonal needs an even rank, not {settings.rank}")
    rounds = config.quantization or is_quantized(base_folder(config.model))
    if rounds or precision_of(config) != "fp32":
        raise ConfigError(
            "--lora-init orthogonal needs --precision fp32 and a base that is not quantized: peft "
            "rounds both matrices to the base's dtype, so their product would not be zero; choose "
            "default or gaussian"
        )


def without_weights(folder: PathLike, *, rewards: bool = False) -> nn.Module:
    """Build the model of `folder` on the meta device; with `rewards`, it has a scalar head."""
    with quietly(), torch.device("meta"):
        return empty_model(Path(folder), reward=rewards or is_reward_model(folder))


def _check_targets(targets: tuple[str, ...], model: nn.Module, folder: PathLike) -> None:
    """Check every target: peft raises an error only if no target matches."""
    paths = [path for path, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            raise ConfigError(
                f"--lora-target {target!r} matches no layer of {folder} that can have an adapter; "
                f"choose from {', '.join(_last_names(paths))}"
            )


def _last_names(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _check_saved_modules(settings: LoraSettings, model: Any, folder: PathLike) -> None:
    """Check that every name in `modules_to_save` matches layers, and only suitable ones."""
    modules = dict(model.named_modules())
    layers = [p for p, m in modules.items() if any(True for _ in m.parameters(recurse=False))]
    head = getattr(model, HEAD, None) or model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    tied = (head, embeddings) if getattr(head, "weight", None) is embeddings.weight else ()
    for name in settings.modules_to_save:
        paths = [path for path in modules if path.endswith(name)]
        if not paths or any(path not in layers for path in paths):
            what = "no layer" if not paths else f"{paths[0]}, which is not a single layer,"
            raise ConfigError(
                f"--lora-modules-to-save {name!r} matches {what} of {folder}; choose from "
                f"{', '.join(_last_names(layers))}"
            )
        for path in paths:
            _check_not_adapted(name, path, settings, is_linear=_is_linear(modules[path], head))
            if modules[path] in tied:
                raise ConfigError(
                    f"--lora-modules-to-save {name!r}: the head and the input embeddings of "
                    f"{folder} share one matrix, and a trained copy of one would separate "
                    f"them; adapt {name} with --lora-target instead, or train all weights"
                )


def _is_linear(layer: nn.Module, head: nn.Module | None) -> bool:
    """Return whether a layer has an adapter by default."""
    return isinstance(layer, (nn.Linear, Conv1D)) and layer is not head


def _check_not_adapted(name: str, path: str, settings: LoraSettings, *, is_linear: bool) -> None:
    """Refuse to train a layer whole that also gets an adapter."""
    named = any(path == target or path.endswith(f".{target}") for target in settings.targets)
    if named or (is_linear and not settings.targets):
        raise ConfigError(
            f"--lora-modules-to-save {name!r}: {path} gets an adapter too; name the layers to "
            f"adapt with --lora-target, without {name}"
        )


NAMES: Mapping[str, str] = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "modules_to_save": "modules_to_save",
    "init_lora_weights": "init",
}
"""Fields of peft's LoraConfig, and the settings with the same meaning."""
WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping"),
    *("fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size"),
}
"""Fields that change nothing in a run: peft sets them, or they need another field."""


def read_lora_config(path: PathLike, *, rewards: bool = False) -> LoraSettings:
    """Read the settings of new adapters from peft's `adapter_config.json`.

    Fields that are missing have peft's defaults, as in peft. A field that has no equivalent here
    must have peft's default.

    Args:
        path: The file, or a folder with it.
        rewards: Whether it is the adapter of a reward model, whose task_type is SEQ_CLS.

    Returns:
        The settings of adapters with the same shape.

    Raises:
        ConfigError: The file is not the config of a LoRA adapter, or a field is not supported; the
            message names it.

    Example:
        >>> settings = read_lora_config("adapter/adapter_config.json")
    """
    check_argument("path", PATH, path)
    path = Path(path)
    path = path / ADAPTER_CONFIG if path.is_dir() else path
    return _settings_of(_json_object(path), str(path), rewards=rewards)


def settings_of_peft(given: Any, folder: PathLike, *, rewards: bool = False) -> LoraSettings:
    """Return the settings of the adapters that a `LoraConfig` of peft describes.

    Args:
        given: The config. Its default for `target_modules` depends on the model, as in peft.
        folder: Folder of the model that gets the adapters.
        rewards: Whether a reward model is trained.

    Raises:
        SettingTypeError: `given` is not a `LoraConfig`.
        ConfigError: A field has no equivalent here and differs from peft's default; the message
            names it.
    """
    from peft import LoraConfig

    if not isinstance(given, LoraConfig):
        hint = (
            "only LoRA adapters are trained: give a LoraConfig, or leave peft_config out to train "
            "all weights"
        )
        if isinstance(given, dict):
            hint = "write LoraConfig(**peft_config)"
        kind = type(given).__name__
        raise SettingTypeError(f"peft_config must be a LoraConfig of peft, not {kind}: {hint}")
    values = _as_json(given)
    if values["target_modules"] is None:
        values["target_modules"] = _default_targets(folder)
    return _settings_of(values, "peft_config", rewards=rewards)


def _default_targets(folder: PathLike) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    found = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if found is None:
        raise ConfigError(
            f"peft_config: peft has no default target_modules for {kind}: list their names, or "
            'write "all-linear"'
        )
    return sorted(found)


def _settings_of(given: dict[str, Any], where: str, *, rewards: bool = False) -> LoraSettings:
    """Return the settings that the fields of a `LoraConfig` describe.

    Args:
        given: The fields as JSON values.
        where: Their origin, for messages.
        rewards: Whether they are for a reward model.
    """
    if (kind := given.pop("peft_type", None)) not in (None, "LORA"):
        raise ConfigError(f"{where}: peft_type {kind} is not supported: give a plain LoraConfig")
    wanted = TASK if rewards else "CAUSAL_LM"
    if (task := given.pop("task_type", None)) not in (None, wanted):
        raise ConfigError(
            f"{where}: task_type {task} is not supported: write {wanted}, or leave it out"
        )
    defaults = _peft_defaults()
    if refused := sorted(_unsupported(given, defaults)):
        raise ConfigError(
            f"{where}: {', '.join(refused)} not supported: leave out what the adapters do not need"
        )
    settings = {ours: given.get(name, defaults[name]) for name, ours in NAMES.items()}
    return LoraSettings(**settings | _lists_of_names(settings, where))


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--lora-config {path}: no such file") from None
    except ValueError as error:
        raise ConfigError(f"--lora-config {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--lora-config {path} is not a JSON object")
    return found


def _peft_defaults() -> dict[str, Any]:
    from peft import LoraConfig

    return _as_json(LoraConfig())


def _as_json(config: Any) -> dict[str, Any]:
    """Return the fields of a peft config as JSON values, with sets as sorted lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _unsupported(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields that change the adapters and have no setting here."""
    for name, value in given.items():
        is_unset = value == defaults.get(name) or value in (None, False, [], {})
        if name not in NAMES and name not in WITHOUT_EFFECT and not is_unset:
            yield f"{name} {json.dumps(value)}"


def _lists_of_names(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return targets and modules_to_save as lists; "all-linear" or none as an empty one."""
    targets, saved = settings["targets"], settings["modules_to_save"]
    if isinstance(targets, str) and targets != "all-linear":
        raise ConfigError(
            f"{where}: target_modules {targets!r} is a pattern; list the names of the modules, or "
            'write "all-linear"'
        )
    if targets is None:
        raise ConfigError(f'{where}: target_modules is missing; write names, or "all-linear"')
    return {"targets": [] if targets == "all-linear" else targets, "modules_to_save": saved or []}
