"""The sizes of a model by the units that sharding gathers at a time, from its config alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from logratio.errors import ConfigError
from logratio.logps.completion import transformer
from logratio.training.activations import decoder_layers
from logratio.training.config import PathLike, Precision, Quantization, TrainConfig
from logratio.training.lora import read_lora_config, with_lora, without_weights
from logratio.training.memory import QUANTIZED_BYTES, SCALE_BYTES
from logratio.training.methods.objective import Objective
from logratio.training.models import base_folder, is_quantized, precision_of, weights_dtype
from logratio.training.speed import flops_of_passes

FLOAT32, BFLOAT16 = 4.0, 2.0
"""Bytes per value."""


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered together: a decoder layer, or all weights outside of them.

    Attributes:
        trained: Number of trained weights.
        frozen: Number of other weights.
        stored: Bytes of all weights as stored, with the scales of quantized ones.
        scales: Bytes of these scales. bitsandbytes keeps them in attributes, so every process has
            all of them.
        gathered: Bytes of all weights as gathered: as stored, but under bf16 those of a layer in
            bfloat16; see `parallel.sharding`.
        forward: FLOPs per token of the forward pass, without attention scores.
        backward: FLOPs per token of the backward pass, likewise.
    """

    trained: int = 0
    frozen: int = 0
    stored: float = 0.0
    scales: float = 0.0
    gathered: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    @property
    def reduced(self) -> float:
        """Bytes of the gradients that are added up over the ranks, in float32."""
        return FLOAT32 * self.trained


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model.

    Attributes:
        layers: The decoder layers, in order.
        root: The weights outside of them: embedding, last norm and head. Its FLOPs are the head's,
            per token of a completion.
        attention: FLOPs of the forward pass per layer and pair of tokens that attend.
        vocabulary: Rows of the head.
        folder: Folder of the config, for estimates by width.
    """

    layers: tuple[Unit, ...]
    root: Unit
    attention: float
    vocabulary: int
    folder: Path

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units."""
        return (self.root, *self.layers)

    @property
    def parameters(self) -> int:
        """Number of weights, trained or not."""
        return sum(unit.trained + unit.frozen for unit in self.units)

    @property
    def trained(self) -> int:
        """Number of trained weights."""
        return sum(unit.trained for unit in self.units)

    @property
    def stored(self) -> float:
        """Bytes of the weights as stored."""
        return sum(unit.stored for unit in self.units)

    @property
    def scales(self) -> float:
        """Bytes of the scales of quantized weights."""
        return sum(unit.scales for unit in self.units)

    def held(self, shards: int) -> float:
        """Return the bytes of the weights in each of `shards` processes."""
        return self.scales + (self.stored - self.scales) / shards

    @property
    def largest(self) -> Unit:
        """The layer that takes the most bytes when gathered."""
        return max(self.layers, key=lambda unit: unit.gathered + unit.reduced)

    def flops(self, tokens: float, targets: float) -> float:
        """Return the FLOPs to train on tokens, `targets` of them in completions.

        As in MFU, neither attention scores nor recomputed layers count.
        """
        body = sum(unit.forward + unit.backward for unit in self.layers)
        return body * tokens + (self.root.forward + self.root.backward) * targets


def policy_shape(config: TrainConfig) -> ModelShape:
    """Return the shape of the model that a run trains; its folder needs no weights.

    Raises:
        ConfigError: The folder's weights are quantized, or the model has no decoder layers.
    """
    folder = Path(config.model)
    rewards = Objective.of(config).scores
    is_new = config.adapter == "merge"
    lora = config.lora if is_new else read_lora_config(folder, rewards=rewards)
    return _shape(folder, lora, precision_of(config), config.quantization, rewards=rewards)


def frozen_shape(
    folder: PathLike, precision: Precision, quantization: Quantization | None
) -> ModelShape:
    """Return the shape of a reference model that is not trained.

    Raises:
        ConfigError: As for `policy_shape`.
    """
    return _shape(Path(folder), None, precision, quantization, trained=False)


def _shape(
    folder: Path,
    lora: Any,
    precision: Precision,
    quantization: Quantization | None,
    *,
    trained: bool = True,
    rewards: bool = False,
) -> ModelShape:
    base = base_folder(folder)
    if is_quantized(base):
        raise ConfigError(
            f"{base}: its weights are quantized in a way that its config alone does not describe; "
            "plan with the model that it was made from, and quantization"
        )
    model = without_weights(base, rewards=rewards).requires_grad_(trained)
    if lora:
        with torch.device("meta"):
            model = with_lora(model, lora, base)
    elif not trained:
        lora = "frozen"
    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(f"{base}: the layers of this model cannot be sharded one by one")
    how = _Storage(model, precision, quantization if lora else None, frozen=bool(lora))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    inner = transformer(model)
    text = inner.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)  # none in Mamba
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    root = how.unit(outside, _matrices(inner.get_output_embeddings()))
    return ModelShape(
        layers=tuple(how.unit(layer.parameters(), _matrices(layer)) for layer in layers),
        root=replace(root, gathered=root.stored - root.scales),
        attention=4.0 * width,
        vocabulary=text.vocab_size,
        folder=base,
    )


def _matrices(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())


class _Storage:
    """How the weights of a model are stored and gathered.

    Args:
        model: The model, on the meta device.
        precision: Precision of the run.
        quantization: Quantization of the linear layers outside the head, or None.
        frozen: Whether the model is not trained, or only its adapters are.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        quantization: Quantization | None,
        *,
        frozen: bool,
    ) -> None:
        self._precision, self._frozen = precision, frozen
        inner = transformer(model)
        embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
        self._embedding = {id(p) for p in embeddings.parameters()}
        self._ends = self._embedding | {id(p) for p in _matrices(head)}
        self._quantized = QUANTIZED_BYTES[quantization] if quantization else None
        self._scale = SCALE_BYTES[quantization] if quantization else 0.0

    def unit(self, weights: Iterable[nn.Parameter], products: Iterable[nn.Parameter]) -> Unit:
        """Return the sizes of `weights`, of which `products` are multiplied with every token."""
        weights, passes = list(weights), [flops_of_passes(p) for p in products]
        trained = sum(p.numel() for p in weights if p.requires_grad)
        scales = self._scale * sum(p.numel() for p in weights if self._is_quantized(p))
        return Unit(
            trained=trained,
            frozen=sum(p.numel() for p in weights) - trained,
            stored=sum(self._stored(p) * p.numel() for p in weights),
            scales=scales,
            gathered=sum(self._gathered(p) * p.numel() for p in weights) - scales,
            forward=sum(forward for forward, _ in passes),
            backward=sum(backward for _, backward in passes),
        )

    def _gathered(self, weight: nn.Parameter) -> float:
        """Return the bytes of one value of a layer's weight: under autocast it is gathered rounded.

        A model with quantized weights is gathered as stored.
        """
        stored = self._stored(weight)
        rounds = self._precision == "bf16" and self._quantized is None
        return min(stored, BFLOAT16) if rounds else stored

    def _is_quantized(self, weight: nn.Parameter) -> bool:
        is_frozen = self._quantized is not None and not weight.requires_grad
        return is_frozen and weight.dim() == 2 and id(weight) not in self._ends

    def _stored(self, weight: nn.Parameter) -> float:
        """Return the bytes of one value, as `memory.training_bytes` counts them."""
        plain = float(weights_dtype(self._precision).itemsize)
        if weight.requires_grad:
            return FLOAT32 if self._frozen else plain
        if self._quantized:
            return self._quantized if self._is_quantized(weight) else plain
        is_rounded = self._precision == "bf16" and id(weight) not in self._embedding
        return BFLOAT16 if is_rounded else plain
