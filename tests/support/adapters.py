"""Adapters of several kinds over a tiny model, far from zero."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import word_tokenizer

from logratio.training import load_model
from logratio.training.models import quietly

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}


def make_adapter(base: Path, folder: Path, seed: int = 3, **settings: Any) -> Path:
    """Save an adapter far from zero, with a dropout that must not act."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, task_type="CAUSAL_LM", **settings)
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's, of tied ends and biases
        model: Any = get_peft_model(load_model(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(str(folder))
    word_tokenizer().save_pretrained(folder)
    return folder
