"""Model families that are tried on a GPU."""

from collections.abc import Callable
from typing import Any

from tiny_models import SIZES, VOCABULARY
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

WINDOW = 37


HEADS: dict[str, Any] = {**SIZES, "hidden_size": 128, "num_key_value_heads": 2, "head_dim": 32}


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**HEADS),
    "llama3": lambda: LlamaConfig(**{**HEADS, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**HEADS, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **HEADS, sliding_window=WINDOW, query_pre_attn_scalar=32, attn_logit_softcapping=5.0
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=1024
    ),
}
