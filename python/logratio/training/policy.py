"""Build the policy of a run: load the model, and add new LoRA adapters if configured."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from logratio.errors import ConfigError
from logratio.training.bfloat16 import with_bfloat16_adapters
from logratio.training.config import LoraSettings, TrainConfig
from logratio.training.models import ADAPTER_CONFIG, load_model, merged, precision_of, quietly


def with_lora(model: nn.Module, settings: LoraSettings, folder: Path) -> nn.Module:
    """Add new LoRA adapters to the model of `folder`; initially they do not change its output."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft scales by any number
        lora_dropout=0.0,
        target_modules=list(settings.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with quietly():
        wrapped = get_peft_model(model, config)
    # An absolute path lets the saved adapter find its base from any working directory.
    wrapped.peft_config["default"].base_model_name_or_path = str(folder.resolve())
    return wrapped


def check_lora_targets(settings: LoraSettings, folder: str | Path) -> None:
    """Check that every LoRA target names a module of the model that can have an adapter.

    peft raises an error only if no target matches, and silently ignores single wrong names.

    Raises:
        ConfigError: A target matches no such module; the message lists the possible names.
    """
    if not settings.targets:
        return
    with quietly(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    for target in settings.targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            names = sorted({path.rpartition(".")[2] for path in paths})
            raise ConfigError(
                f"lora target {target!r} matches no layer of {folder} that can have an adapter; "
                f"choose from {', '.join(names)}"
            )


def build_policy(config: TrainConfig, device: str) -> nn.Module:
    """Load the policy, with new adapters if configured; only trained weights require gradients."""
    precision, adapts = precision_of(config), config.lora is not None
    model = load_model(
        config.model, device=device, precision=precision, frozen=adapts, in_place=True
    )
    if (Path(config.model) / ADAPTER_CONFIG).exists():
        return merged(model).requires_grad_(True)
    if config.lora is None:
        return model
    is_wrapped = hasattr(model, "peft_config")  # a peft model in memory
    policy = model if is_wrapped else with_lora(model, config.lora, Path(config.model))
    return policy if precision == "fp32" else with_bfloat16_adapters(policy)
