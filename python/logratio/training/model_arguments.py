"""The models and the tokenizer of a run, from whatever names them: folders, hub ids or objects."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from logratio.bundle import TOKENIZER_FILES
from logratio.errors import ConfigError, SettingTypeError
from logratio.hub import HubError, local_folder
from logratio.training.given_model import GivenModel
from logratio.training.models import ADAPTER_CONFIG, base_folder

OF_TOKENIZERS = {
    *TOKENIZER_FILES,
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
}
"""Files of a folder that another tokenizer replaces."""


def given_policy(model: Any, tokenizer: Any, revision: str | None) -> GivenModel | None:
    """Give a folder to a model in memory, or to a model's folder with another tokenizer.

    Args:
        model: A folder, a hub id, a `PreTrainedModel` or a `PeftModel`.
        tokenizer: A tokenizer of transformers, a folder with one, or a hub id. None: that of
            the model's folder; of an object, that of the folder or id it was loaded from.
        revision: Revision of a hub id of the model.

    Returns:
        The model, which must be kept during the run; None if `model` is a folder or an id, and no
        tokenizer is given.

    Raises:
        ConfigError: The model or the tokenizer cannot be used; the message has the reason.
        SettingTypeError: An argument is of another type.
        HubError: A model or tokenizer is not available.
    """
    if isinstance(model, str | Path):
        return None if tokenizer is None else _combined(local_folder(model, revision), tokenizer)
    check_object("model", model)
    source = _source(_base(model))
    if tokenizer is None and (source is None or not (source / TOKENIZER_FILES[0]).exists()):
        raise ConfigError("the model is an object: pass its tokenizer too, as tokenizer=…")
    given = GivenModel(model, source=source)
    _write_config(given)
    _write_tokenizer(source if tokenizer is None else tokenizer, given.folder)
    return given


def given_reference(model: Any) -> GivenModel:
    """Give a folder to a reference in memory. It is used itself, without a copy, and not trained.

    Raises:
        ConfigError: The model cannot be used, or has an adapter.
        SettingTypeError: It is not a model.
    """
    check_object("reference", model)
    given = GivenModel(model, source=_source(_base(model)), is_reference=True)
    if given.has_adapter:
        raise ConfigError(
            "the reference is a peft model: pass model.merge_and_unload(), or the adapter's folder"
        )
    _write_config(given)
    return given


def check_object(name: str, model: Any) -> None:
    """Check that a model in memory can be trained or scored.

    Args:
        name: Its argument, for the message.
        model: The object.

    Raises:
        SettingTypeError: It is not a model of transformers.
        ConfigError: It is quantized, incomplete, spread over devices, not a causal language model,
            or has rounded buffers.
    """
    base = _base(model)
    if not isinstance(base, PreTrainedModel):
        raise SettingTypeError(
            f"{name} must be a folder, an id of the Hugging Face hub, or a PreTrainedModel, not "
            f"{type(model).__name__}"
        )
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base.config), ())
    if not isinstance(base, kind):
        raise ConfigError(
            f"{name} is a {type(base).__name__}, which is not a causal language model of "
            "transformers: load it with AutoModelForCausalLM"
        )
    if why := _unusable(base):
        raise ConfigError(f"{name}: {why}")


def _unusable(model: nn.Module) -> str | None:
    """Return why a model in memory cannot be used; None if it can."""
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        return "a quantized model in memory is not supported: give its folder"
    devices = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in devices:
        return "its weights are on the meta device, or offloaded: load them first"
    if len(devices) > 1:
        return f"its weights are on {len(devices)} devices: load it without device_map"
    low = [name for name, b in model.named_buffers() if b.dtype in (torch.bfloat16, torch.float16)]
    if low:
        return (
            f"its buffer {low[0]} was rounded to 16 bits by .to(), .half() or .bfloat16(): load "
            "the model with from_pretrained(…, dtype=torch.bfloat16), which keeps it in float32"
        )
    return None


def _base(model: Any) -> Any:
    """Return the model inside a peft wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _source(model: Any) -> Path | None:
    """Return the folder that a model was loaded from, or its snapshot in the hub's cache."""
    name, commit = model.name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:
        return None
    try:
        revision = None if Path(name).exists() else commit
        folder = local_folder(name, revision, weights=False)
    except HubError:
        return None
    return folder if folder.is_dir() else None


def _write_config(given: GivenModel) -> None:
    """Write the configs of a model in memory."""
    base = given.base
    base.config.save_pretrained(given.folder)
    if (generation := base.generation_config) is not None:
        # save_pretrained would refuse settings of sampling that contradict each other.
        (given.folder / "generation_config.json").write_text(generation.to_json_string())


def _combined(folder: Path, tokenizer: Any) -> GivenModel:
    """Combine the weights of a folder with another tokenizer."""
    given = GivenModel(source=folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file() and path.name not in OF_TOKENIZERS | {ADAPTER_CONFIG}:
            (given.folder / path.name).symlink_to(path.resolve())
    if (folder / ADAPTER_CONFIG).exists():
        settings = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        settings |= {"base_model_name_or_path": str(base_folder(folder).resolve())}
        (given.folder / ADAPTER_CONFIG).write_text(json.dumps(settings))
    _write_tokenizer(tokenizer, given.folder)
    return given


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer, or copy those of a folder, to `folder`."""
    if isinstance(tokenizer, str | Path):
        source = local_folder(tokenizer, weights=False)
        if not (source / TOKENIZER_FILES[0]).exists():
            raise ConfigError(f"tokenizer: {tokenizer} has no {TOKENIZER_FILES[0]}")
        for name in OF_TOKENIZERS:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        return
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = getattr(tokenizer, "tokenizer", None)
        hint = ": pass its .tokenizer" if isinstance(inner, PreTrainedTokenizerBase) else ""
        raise SettingTypeError(
            "tokenizer must be a tokenizer of transformers, a folder or a hub id, not "
            f"{type(tokenizer).__name__}{hint}"
        )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__name__} is a slow tokenizer without a tokenizer.json; "
            "a PreTrainedTokenizerFast is needed"
        )
    tokenizer.save_pretrained(folder)
