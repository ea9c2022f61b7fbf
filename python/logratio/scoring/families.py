"""Which models can be exported: one list, and a sentence for each that is not on it."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from logratio.logps.apart import ropes
from logratio.logps.checks import UnsupportedModelError

FAMILIES = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
"""transformers' `model_type`s whose graph was compared with torch at many shapes."""

_STATEFUL = ("mamba", "rwkv", "jamba", "zamba", "recurrent", "falcon_h1", "bamba", "lfm2", "_next")
_EXPORTABLE_ATTENTION = ("sdpa", "eager")


def check_exportable(config: PreTrainedConfig, max_length: int) -> None:
    """Refuse a model whose exported graph would be wrong, or could not be made.

    Args:
        config: Of a causal language model.
        max_length: Most tokens of a prompt and a completion together.

    Raises:
        UnsupportedModelError: With the reason.
    """
    name = f"a {config.model_type} model"
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"{name} cannot be exported: {_why_not(config)}")
    if max_length > max_positions(config):
        raise UnsupportedModelError(
            f"{name} with {max_positions(config)} positions cannot score {max_length} tokens"
        )
    for rope in ropes(config):
        _check_rope(rope, name, config, max_length)


def max_positions(config: PreTrainedConfig) -> int:
    """Return the longest sequence that a model was made for."""
    return int(config.max_position_embeddings)


def use_exportable_attention(model: PreTrainedModel) -> None:
    """Choose an attention that can be exported, which flash and flex attention cannot."""
    if model.config._attn_implementation not in _EXPORTABLE_ATTENTION:
        model.set_attn_implementation("sdpa")


def _why_not(config: PreTrainedConfig) -> str:
    if any(word in config.model_type for word in _STATEFUL):
        return (
            "its state runs through the tokens, so a prompt cannot be run once for many "
            "candidates. Its rewards can still be computed with torch: `logratio evaluate`"
        )
    if any("expert" in key for key in config.to_dict()):
        return "mixtures of experts have no exact ONNX form yet"
    return f"the families that were checked are {', '.join(sorted(FAMILIES))}"


def _check_rope(rope: dict[str, Any], name: str, config: PreTrainedConfig, length: int) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "dynamic":
        raise UnsupportedModelError(
            f"{name} cannot be exported: its dynamic RoPE depends on the longest sequence so far"
        )
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or max_positions(config)
        if length > original:
            raise UnsupportedModelError(
                f"{name}: LongRoPE changes its factors above {original} tokens, which a graph "
                f"cannot, and the rules allow {length}"
            )
