"""Reward models: which folders hold one, and how one is built from a causal language model.

A reward model is transformers' class for sequence classification with one label: the body of a
causal language model with the layer `score` in place of its head. So transformers and TRL load what
is trained here, and reward models that they have trained are read here.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from logratio.logps.scores import HEAD

TASK = "SEQ_CLS"
"""peft's name of the task of a reward model's adapter."""


def is_reward_model(folder: str | Path) -> bool:
    """Return whether a folder contains a reward model, or an adapter that is one with its base."""
    folder = Path(folder)
    adapter = folder / ADAPTER_CONFIG_NAME
    if adapter.exists():
        return bool(json.loads(adapter.read_text("utf-8")).get("task_type") == TASK)
    if not (folder / CONFIG_NAME).exists():
        return False
    names = json.loads((folder / CONFIG_NAME).read_text("utf-8")).get("architectures") or []
    return any("ForSequenceClassification" in name for name in names)


def refusal_of(folder: Path, base: Path) -> str | None:
    """Return why a model cannot be used, or trained, as a reward model; None if it can.

    Args:
        folder: Folder of a model or an adapter, which may have no scalar head yet.
        base: Folder of its base, or `folder` itself.
    """
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return (
            f"{folder} is a model of type {config.model_type}, for which transformers has no class "
            "with a scalar head: choose another family"
        )
    with torch.device("meta"):
        layer = getattr(empty_model(base, reward=True), HEAD, None)
    if not isinstance(layer, nn.Linear):
        return (
            f"{folder} is a model of type {config.model_type}, whose class in transformers has no "
            f"linear layer {HEAD!r}: choose another family"
        )
    if is_reward_model(base) and config.num_labels != 1:
        return (
            f"{base} is a classifier with {config.num_labels} labels, and a reward model has one "
            "output"
        )
    if folder != base and is_reward_model(folder) and not is_reward_model(base):
        return _without_head(folder)
    return None


def _without_head(adapter: Path) -> str | None:
    """Return why an adapter over a causal language model has no score; None if it has one."""
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if f".{HEAD}." in name]  # noqa: SIM118
    if names:
        return None
    return (
        f"{adapter} has no weights of the head {HEAD!r}, and its base has no such layer: train it "
        f"with modules_to_save=[{HEAD!r}]"
    )


def empty_model(folder: Path, dtype: torch.dtype | None = None, *, reward: bool) -> nn.Module:
    """Build the model of a folder on the current device with undefined weights.

    Args:
        folder: Folder with a config.
        dtype: Dtype of the weights; None: torch's default.
        reward: Build it with a scalar head.
    """
    config = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **_labels(reward=reward)
    )
    kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model: nn.Module = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    if reward and not is_reward_model(folder):
        _keep_ends(config)
    return model


def read_model(
    folder: Path, dtype: torch.dtype, special: dict[str, Any], *, head_seed: int | None
) -> tuple[nn.Module, Collection[str]]:
    """Read the model of a folder.

    Args:
        folder: Folder of a model.
        dtype: Dtype of the weights.
        special: Further arguments of `from_pretrained`.
        head_seed: Seed of the weights of a scalar head, for a model without one. None: the model
            has the head that its folder has.

    Returns:
        The model, and the names of weights that the folder lacks.

    Raises:
        ImportError: A library for the weights is not installed.
    """
    is_new = head_seed is not None and not is_reward_model(folder)
    reward = is_new or is_reward_model(folder)
    kind: Any = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    loaded: Any = kind.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **_labels(reward=is_new),
        **special,
    )
    model, missing = loaded[0], loaded[1]["missing_keys"]
    if head_seed is not None and is_new:
        _draw_head(model, head_seed)
        _keep_ends(model.config)
        missing = [name for name in missing if not name.startswith(f"{HEAD}.")]
    return model, missing


def _labels(*, reward: bool) -> dict[str, int]:
    return {"num_labels": 1} if reward else {}


@torch.no_grad()
def _draw_head(model: Any, seed: int) -> None:
    """Draw the weights of a new head as transformers does, from a generator of their own."""
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    random = torch.Generator().manual_seed(seed)
    for parameter in getattr(model, HEAD).parameters():
        drawn = torch.randn(parameter.shape, generator=random) * spread
        parameter.copy_(drawn if parameter.dim() > 1 else torch.zeros_like(drawn))


def _keep_ends(config: PreTrainedConfig) -> None:
    """Let the token that ends a completion be scored, also where it is the padding token.

    transformers scores the last token that is not `pad_token_id`, which would be the one before it.
    Without a padding token, transformers refuses padded batches.
    """
    text = config.get_text_config()
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if text.pad_token_id in ends:
        text.pad_token_id = None
