"""Tiny random models of each family, from a seed; nothing is downloaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCABULARY = 211
WINDOW = 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}

FAMILIES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: Phi3Config(**GROUPED, pad_token_id=0),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}


def mamba_config() -> MambaConfig:
    """A family that carries a state across tokens, so that prompts cannot be shared."""
    return MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)


def tiny(config: PreTrainedConfig, seed: int = 0, scale: float = 8.0) -> PreTrainedModel:
    """Build a random model whose log-probs are far from uniform, as `load_model` leaves one."""
    from logratio.training.models import with_softcap, without_dropout

    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    with_softcap(without_dropout(model)).eval()
    return model


WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "a",
    "the",
    "cat",
    "dog",
    "bird",
    "sits",
    "runs",
    "sings",
    "on",
    "in",
    "under",
    "tree",
    "house",
    "mat",
    "happy",
    "sad",
    "loud",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with BOS, for tests that need text."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny_model(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a tiny Llama with the word-level tokenizer to `folder`."""
    sizes = {**GROUPED, "vocab_size": len(WORDS), "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, pad_token_id=0)
    tiny(config, seed, scale=2.0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
