"""Sizes of the models of bench_step.py, by name; the weights are random. `toy` is for tests."""

from collections.abc import Callable, Mapping

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

POSITIONS = 1024


def _llama(layers: int, width: int, inner: int, heads: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )


def _qwen2(layers: int, width: int, inner: int, heads: int, groups: int) -> Qwen2Config:
    return Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=151_936,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )


MODELS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "toy": lambda: _llama(2, 32, 64, 4, 512),
    "small": lambda: _llama(6, 288, 768, 6, 32_000),
    "large": lambda: _llama(12, 768, 2_048, 12, 50_257),
    "0.5B": lambda: _qwen2(24, 896, 4_864, 14, 2),
    "1.5B": lambda: _qwen2(28, 1_536, 8_960, 12, 2),
}
"""The last two are for a GPU, and have not run on one yet."""
