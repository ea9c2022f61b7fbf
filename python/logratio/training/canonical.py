"""A model's and an adapter's settings in one spelling, without what cannot change a log-prob."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

NAMES = {
    "_name_or_path", "architectures", "auto_map", "transformers_version", "_commit_hash",
    "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id",
}  # fmt: skip
"""What a model is called, and classifiers' labels. The class follows from `model_type` alone."""

LOADING = {
    "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "gradient_checkpointing",
}  # fmt: skip
"""How weights are stored, loaded and run. They are always loaded in float32: the dtype that they
are stored in is hashed with them, and the attention is a soft field."""

TRAINING = {
    "attention_dropout", "attn_pdrop", "attn_dropout", "embd_pdrop", "embedding_dropout",
    "resid_pdrop", "resid_dropout", "hidden_dropout", "dropout", "activation_dropout",
    "ffn_dropout", "layerdrop", "layer_dropout", "classifier_dropout", "summary_first_dropout",
    "initializer_range", "initializer_factor", "router_aux_loss_coef", "router_z_loss_coef",
    "router_jitter_noise",
}  # fmt: skip
"""What acts in training mode only, or before the weights are loaded; dropout is always off here."""

IGNORED_CONFIG = NAMES | LOADING | TRAINING
"""Config entries that cannot change a log-prob. An entry that is not named here can."""

IGNORED_ADAPTER_CONFIG = {
    "base_model_name_or_path", "inference_mode", "revision", "peft_version", "lora_dropout",
}  # fmt: skip
"""The base's weights are hashed themselves, wherever it lies."""


def model_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a model folder's config.json with every default filled in.

    A default that is left out and one that is spelled are equal, as are `10000` and `10000.0` and
    names of other times for the same setting. Where transformers does not know the model, the file
    counts as it is.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:
        written = json.loads((folder / "config.json").read_text())
        return {k: _plain(v) for k, v in sorted(written.items()) if k not in IGNORED_CONFIG}
    return _settings(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a config and of the configs inside it (text, vision).

    A known field that is None is left out, so that a version of transformers that knows more
    optional fields finds the same reference.
    """
    known = {field.name for field in fields(config)}
    found = {}
    for name, value in sorted(json.loads(config.to_json_string(use_diff=False)).items()):
        if name in IGNORED_CONFIG or (value is None and name in known):
            continue
        part = getattr(config, name, None)
        found[name] = _settings(part) if isinstance(part, PreTrainedConfig) else _plain(value)
    return found


def adapter_settings(path: Path) -> dict[str, Any]:
    """Return the settings in adapter_config.json; lists of names there are sets, in any order."""
    found = {}
    for name, value in sorted(json.loads(path.read_text()).items()):
        if name not in IGNORED_ADAPTER_CONFIG:
            is_names = isinstance(value, list) and all(isinstance(v, str) for v in value)
            found[name] = sorted(value) if is_names else _plain(value)
    return found


def _plain(value: Any) -> Any:
    """Write whole floats as integers, at any depth."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
