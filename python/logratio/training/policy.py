"""Build the policy of a run: a model, a model with new adapters, or an adapter to train further.

A policy that starts from an adapter and keeps it holds that adapter twice: as peft's "default",
which is trained, and as `REFERENCE`, which stays as it was. So its reference needs no second model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from logratio.training.bfloat16 import with_bfloat16_adapters
from logratio.training.config import TrainConfig
from logratio.training.given_model import continued_model
from logratio.training.lora import use_dropout, widen_saved_modules, with_lora
from logratio.training.methods.objective import Objective
from logratio.training.models import (
    ADAPTER_CONFIG,
    base_folder,
    load_model,
    merged,
    precision_of,
    quietly,
    with_adapter,
    without_dropout,
)
from logratio.training.reward_model import is_reward_model
from logratio.training.validation import reference_kind

TRAINED, REFERENCE = "default", "reference"
"""Names of the adapters of a policy; peft's own name for the first."""


def build_policy(config: TrainConfig, device: str) -> nn.Module:
    """Load the policy; only the weights to train require gradients.

    Args:
        config: Settings of the run.
        device: Device for the weights; "meta": without weights, for a caller that fills them.

    Returns:
        The policy in eval mode, except for the dropout of its adapters if `config.lora` has one.
    """
    if config.adapter == "continue":
        return _continued(config, device)
    model = load_model(
        config.model,
        device=device,
        quantization=config.quantization,
        precision=precision_of(config),
        frozen=config.lora is not None,
        in_place=True,
        head_seed=config.seed if Objective.of(config).scores else None,
    )
    if (Path(config.model) / ADAPTER_CONFIG).exists():
        return merged(model).requires_grad_(True)
    if config.lora is None:
        return model
    is_wrapped = hasattr(model, "peft_config")  # a peft model in memory
    # Initialisations such as PiSSA decompose the weights, which are not there yet.
    lora = config.lora if device != "meta" else replace(config.lora, init="default")
    adapted = model if is_wrapped else with_lora(model, lora, Path(config.model))
    policy = _in_precision(adapted, config)
    if config.lora.dropout:
        use_dropout(policy)
    return policy


def _in_precision(policy: nn.Module, config: TrainConfig) -> nn.Module:
    return policy if precision_of(config) == "fp32" else with_bfloat16_adapters(policy)


def _continued(config: TrainConfig, device: str) -> nn.Module:
    """Load the adapter in `config.model` to train it, and a frozen copy if it is the reference."""
    folder = Path(config.model)
    is_object = continued_model(folder) is not None
    loaded = load_model(
        folder if is_object else base_folder(folder),
        device=device,
        quantization=config.quantization,
        precision=precision_of(config),
        frozen=True,
        in_place=is_object,
        head_seed=config.seed if is_reward_model(folder) else None,
    )
    policy: Any = loaded if is_object else with_adapter(loaded, folder, device)
    adapters = [TRAINED]
    if reference_kind(config) == "adapter":
        with quietly():
            if device == "meta":
                policy.add_adapter(REFERENCE, copy(policy.peft_config[TRAINED]))
            else:
                policy.load_adapter(str(folder), REFERENCE, torch_device=device)
        adapters.append(REFERENCE)
        without_dropout(policy).eval()
    if widen_saved_modules(policy) and device != "meta":
        _read_again(policy, folder, adapters)
    policy.requires_grad_(False)
    policy.set_adapter(TRAINED)
    # An absolute path lets the saved adapter find its base from any working directory.
    policy.peft_config[TRAINED].base_model_name_or_path = str(base_folder(folder).resolve())
    return _in_precision(policy, config)


def _read_again(policy: nn.Module, folder: Path, adapters: list[str]) -> None:
    """Read the adapters' weights into copies of layers that were in bfloat16 at the first read."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device="cpu")
    for name in adapters:
        set_peft_model_state_dict(policy, dict(weights), adapter_name=name)


@contextmanager
def as_reference(policy: Any) -> Iterator[None]:
    """Make a policy with adapters compute as its reference inside the block.

    That is the frozen copy of the adapter that the policy started from, if there is one, else the
    base model with its adapters disabled.
    """
    if REFERENCE not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    policy.set_adapter(REFERENCE)
    try:
        yield
    finally:
        policy.set_adapter(TRAINED)


def save_weights(policy: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the policy's model, or its trained adapter alone, to `folder` (safetensors).

    Args:
        policy: The policy.
        folder: The folder.
        weights: Whole weights by name, in place of those of a policy that is sharded.
    """
    selected = {"selected_adapters": [TRAINED]} if hasattr(policy, "get_base_model") else {}
    gathered = {} if weights is None else {"state_dict": weights}
    policy.save_pretrained(folder, **selected, **gathered)
