"""Tiny configurations of many model families, with the layout that each is to get and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 199
WINDOW = 9
"""Tokens of sliding windows: fewer than most prompts, so that windows reach into them."""
POSITIONS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SIZES = POSITIONS | {"intermediate_size": 96, "max_position_embeddings": 128}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.6,
}
MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 1,
    "mamba_chunk_size": 16,
}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Family:
    """A family's tiny configuration, and what `choose_layout` is to say of it.

    Attributes:
        kind: `model_type` of transformers.
        fields: of the configuration.
        reason: part of the reason for the padded layout; empty where prompts are shared.
        scale: factor on the initial weights, so that log-probs are far from uniform.
    """

    kind: str
    fields: Mapping[str, Any]
    reason: str = ""
    scale: float = 4.0

    @property
    def layout(self) -> str:
        """The layout that `choose_layout` is to give."""
        return "padded" if self.reason else "shared"

    def config(self, **changes: Any) -> PreTrainedConfig:
        """Make the configuration, with some fields changed."""
        made: PreTrainedConfig = AutoConfig.for_model(self.kind, **{**self.fields, **changes})
        return made


CROSSTALK = r"carry a state"
OWN_ATTENTION = "custom code"

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", SIZES),
    "llama-gqa": Family("llama", GROUPED),
    "qwen2": Family("qwen2", GROUPED),
    "qwen3": Family("qwen3", GROUPED),
    "mistral": Family("mistral", GROUPED | {"sliding_window": WINDOW}),
    "gemma2": Family(
        "gemma2",
        GROUPED
        | ALTERNATING
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        | {"query_pre_attn_scalar": 16},
    ),
    "gemma3": Family("gemma3_text", GROUPED | ALTERNATING | {"query_pre_attn_scalar": 16}),
    "phi3": Family("phi3", GROUPED),
    "gpt2": Family(
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt-neox": Family("gpt_neox", SIZES),
    "opt": Family("opt", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "smollm3": Family("smollm3", GROUPED | {"no_rope_layers": [1, 0]}),
    "olmo2": Family("olmo2", GROUPED),
    "mixtral": Family("mixtral", GROUPED | LOCAL_EXPERTS),
    "qwen2-moe": Family("qwen2_moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3-moe": Family("qwen3_moe", GROUPED | EXPERTS),
    "cohere": Family("cohere", GROUPED | {"logit_scale": 0.5}),
    "granite": Family("granite", GROUPED | MULTIPLIERS),
    "gpt-oss": Family("gpt_oss", GROUPED | ALTERNATING | LOCAL_EXPERTS),
    "falcon-h1": Family("falcon_h1", GROUPED | MAMBA, CROSSTALK),
    "mamba": Family(
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 4, "num_hidden_layers": 2},
        CROSSTALK,
        scale=1.0,
    ),
    "lfm2": Family("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, CROSSTALK),
    "qwen3-next": Family(
        "qwen3_next",
        GROUPED | EXPERTS | LINEAR_ATTENTION | {"shared_expert_intermediate_size": 48},
        CROSSTALK,
        scale=2.0,
    ),
    "falcon": Family("falcon", POSITIONS, OWN_ATTENTION),
    "falcon-alibi": Family("falcon", POSITIONS | {"alibi": True}, OWN_ATTENTION),
    "bloom": Family(
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        OWN_ATTENTION,
    ),
    "bart-decoder": Family(
        "bart",
        {"vocab_size": VOCABULARY, "d_model": 64, "decoder_layers": 2, "decoder_ffn_dim": 96}
        | {"decoder_attention_heads": 4, "max_position_embeddings": 128}
        | {"is_decoder": True, "is_encoder_decoder": False},
        "takes no position_ids",
    ),
    "stablelm": Family(
        "stablelm", SIZES | {"num_key_value_heads": 4}, "does not pass keyword arguments"
    ),
}
"""Every family that is tested, under the name that people know."""

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")
"""Those with routed experts."""

SCALED_HEADS: Mapping[str, Family] = {
    "falcon-h1": Family("falcon_h1", GROUPED | MAMBA | {"lm_head_multiplier": 0.5}),
    "hyperclovax": Family("hyperclovax", GROUPED | {"logits_scaling": 0.5}),
    "recurrent-gemma": Family(
        "recurrent_gemma",
        GROUPED | {"lru_width": 64, "logits_soft_cap": 2.0, "attention_window_size": WINDOW},
    ),
}
"""Heads that scale or cap logits under other names."""

UNKNOWN_HEADS: Mapping[str, Family] = {
    "modernbert-decoder": Family("modernbert-decoder", SIZES),
    "llama4": Family("llama4_text", GROUPED | LOCAL_EXPERTS | {"intermediate_size_mlp": 96}),
}
"""Heads that the engine does not know: refused at the start."""
