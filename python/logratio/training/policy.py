"""The policy of a run: loaded, with fresh adapters (LoRA) where they are asked for."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from logratio.errors import ConfigError
from logratio.training.bfloat16 import with_low_adapters
from logratio.training.config import LoraSettings, TrainConfig
from logratio.training.models import ADAPTER_CONFIG, load_model, merged, precision_of, quietly


def with_lora(model: nn.Module, settings: LoraSettings, folder: Path) -> nn.Module:
    """Wrap the model of `folder` in fresh adapters; at the start they change nothing."""
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
    # The base is found again from any working directory.
    wrapped.peft_config["default"].base_model_name_or_path = str(folder.resolve())
    return wrapped


def check_lora_targets(settings: LoraSettings, folder: str | Path) -> None:
    """Refuse names of modules that the model of `folder` does not have, or that take no adapter.

    peft refuses only when no name fits at all, and passes over the others in silence.

    Raises:
        ConfigError: names the one, and those that exist.
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
                f"lora target {target!r} is no layer of {folder} that takes an adapter; there are "
                f"{', '.join(names)}"
            )


def build_policy(config: TrainConfig, device: str) -> nn.Module:
    """Load the policy, with fresh adapters if asked; only what trains requires gradients."""
    precision, adapts = precision_of(config), config.lora is not None
    model = load_model(config.model, device=device, precision=precision, frozen=adapts)
    if (Path(config.model) / ADAPTER_CONFIG).exists():
        return merged(model).requires_grad_(True)
    if config.lora is None:
        return model
    policy = with_lora(model, config.lora, Path(config.model))
    return policy if precision == "fp32" else with_low_adapters(policy)
