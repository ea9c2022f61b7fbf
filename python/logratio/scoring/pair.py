"""Policy and reference, loaded; sharing their base where the policy is a plain adapter on it."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from logratio.logps.completion import transformer
from logratio.training.models import merged

TWO_MODELS, ADAPTER = "two_models", "adapter"


@dataclass(frozen=True)
class ModelPair:
    """What the scorer is made of.

    Attributes:
        policy: A model, or a peft model whose base is the reference.
        reference: The other model; None where the policy's base with the adapter off is it.
    """

    policy: nn.Module
    reference: nn.Module | None

    @property
    def kind(self) -> str:
        """``adapter`` or ``two_models``, for the manifest."""
        return ADAPTER if self.reference is None else TWO_MODELS


def join(policy: nn.Module, reference: nn.Module) -> ModelPair:
    """Choose how two loaded models go into one graph; adapters may be merged in place.

    A LoRA policy keeps its base once, with the adapter on for one pass and off for the other, if
    that base is the reference. Every other adapter is merged into its own copy of the weights:
    DoRA, adapters of the embeddings or the head, modules that were trained whole.
    """
    if is_plain_lora(policy) and has_weights_of(policy, reference):
        return ModelPair(policy, None)
    return ModelPair(merged(policy), merged(reference))


def is_plain_lora(model: nn.Module) -> bool:
    """Tell whether switching a model's adapter off is exact and the adapter all that was trained.

    Only low-rank updates of linear layers of the body are: what else peft can train either
    changes weights that switching off does not restore, or bypasses the layers it is added to.
    """
    if not isinstance(model, PeftModel) or len(model.peft_config) != 1:
        return False
    config = next(iter(model.peft_config.values()))
    plain = (
        isinstance(config, LoraConfig)
        and config.bias == "none"
        and not config.use_dora
        and not config.modules_to_save
        and not config.trainable_token_indices
        and not getattr(config, "target_parameters", None)
    )
    return plain and all(map(_is_linear, _lora_layers(model))) and not _adapts_ends(model)


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _is_linear(layer: LoraLayer) -> bool:
    return isinstance(layer, LoraLinear) and not getattr(layer, "lora_variant", None)


def _adapts_ends(model: nn.Module) -> bool:
    inner = transformer(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return any(isinstance(end, LoraLayer) for end in ends)


def has_weights_of(policy: nn.Module, reference: nn.Module) -> bool:
    """Tell whether a peft model's base equals a plain model, bit for bit."""
    if isinstance(reference, PeftModel):
        return False
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in transformer(policy).state_dict().items()
        if ".lora_" not in name
    }
    weights: dict[str, Tensor] = reference.state_dict()
    return base.keys() == weights.keys() and all(
        tensor.shape == weights[name].shape and torch.equal(tensor, weights[name])
        for name, tensor in base.items()
    )
