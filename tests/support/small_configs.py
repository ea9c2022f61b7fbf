"""A small configuration of every causal language model of the installed transformers.

A config class says which fields it has; those that set a size get a small value here. What a class
needs besides is in `NEEDS`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 199
WINDOW = 9
TOP_K = 16
_VALUES: Mapping[int, str] = {
    1: "n_group topk_group num_expert_group first_k_dense_replace decoder_sparse_step mamba_expand "
    "expand n_groups n_shared_experts bos_token_id decoder_start_token_id",
    2: "num_hidden_layers num_key_value_heads n_layer n_layers decoder_layers encoder_layers "
    "num_layers num_experts_per_tok num_experts_per_token moe_k moe_topk linear_num_key_heads "
    "index_n_heads global_attn_every_n_layers eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads conv_kernel "
    "encoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts "
    "state_size time_step_rank mamba_n_heads mamba_num_heads mamba_dt_rank linear_num_value_heads "
    "linear_num_heads",
    8: "qk_rope_head_dim qk_nope_head_dim mamba_d_state ssm_state_size linear_key_head_dim "
    "linear_value_head_dim rotary_dim laurel_rank",
    16: "head_dim d_kv kv_lora_rank q_lora_rank v_head_dim index_head_dim mamba_d_head "
    "mamba_head_dim mamba_chunk_size chunk_size hidden_size_per_layer_input linear_head_dim "
    "attention_head_dim lightning_head_dim",
    48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "mlp_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    64: "hidden_size n_embd d_model dim lru_width mamba_d_ssm word_embed_proj_dim embedding_size "
    "decoder_embed_dim",
    96: "intermediate_size d_ff ffn_dim decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp "
    "ffn_hidden_size dense_intermediate_size",
    256: "max_position_embeddings n_positions max_seq_len",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    WINDOW: "sliding_window attention_window_size local_attention window_size attention_window",
    TOP_K: "index_topk keep_window_size",
    0: "pad_token_id num_kv_shared_layers",
}
SIZES = {name: value for value, names in _VALUES.items() for name in names.split()}

OWN = "no such field"
"""A field that is left to the class itself."""
_TWO = {"mlp_layer_types": ["dense", "sparse"]}
_LINEAR = _TWO | {"layer_types": ["linear_attention", "full_attention"]}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_COMPRESSED = ["heavily_compressed_attention", "compressed_sparse_attention"]
_RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
_HYBRID: dict[str, Any] = {
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "mamba_expand": 2,
}
_HYBRID |= {"num_key_value_heads": 4, "head_dim": OWN, "layer_types": OWN}

_SCALED_QUERIES = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.1,
}
"""Queries grow with positions, in steps of the original length."""

NEEDS: Mapping[str, dict[str, Any]] = {
    "axk1": _TWO,
    "axk2": _TWO | {"gated_norm_rank": 8},
    "bailing_hybrid": _LINEAR,
    "bamba": {"layer_types": OWN, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _PLAIN_ROPE),
    },
    "cpmant": {
        "dim_ff": 96,
        "dim_head": 16,
        "prompt_types": 4,
        "prompt_length": 4,
        "segment_types": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "num_key_value_heads": OWN,
    },
    "deepseek_v4": {
        "layer_types": [*_COMPRESSED, "sliding_attention"],
        "num_hidden_layers": 3,
        "compress_rates": _RATES,
        "index_topk": 64,
        "o_groups": 2,
        "o_lora_rank": 16,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hc_mult": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "dots3_note_text": _TWO | {"per_layer_config": {}, "head_dim": 16},
    "falcon": {"head_dim": OWN},
    "falcon_h1": {"layer_types": OWN},
    "falcon_mamba": {"layer_types": OWN},
    "gemma4_text": {"per_layer_config": {}, "global_head_dim": 16},
    "gemma4_unified_text": {"per_layer_config": {}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": OWN},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        "layer_types": OWN,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "kimi_linear": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba": {"layer_types": OWN},
    "mamba2": {"layer_types": OWN, "head_dim": 32, "expand": 2},
    "minimax_m3_vl_text": _TWO
    | {"index_block_size": 8, "index_topk_blocks": 2}
    | {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"head_dim": 16},
    "ministral3": {"rope_parameters": _SCALED_QUERIES},
    "prophetnet": {
        "num_hidden_layers": OWN,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "head_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": TOP_K,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 4,
    },
    "recurrent_gemma": {"layer_types": OWN, "num_hidden_layers": 3, "num_key_value_heads": 4},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "attention_head_size": 16,
        "feed_forward_size": 96,
    },
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xlnet": {"max_position_embeddings": OWN},
    "xlstm": {"v_head_dim": OWN, "embedding_dim": 64, "head_dim": OWN},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID
    | {"num_hidden_layers": 6, "n_mamba_heads": 2}
    | {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": _HYBRID
    | {"num_hidden_layers": 4, "n_mamba_heads": 4, "mamba_headdim": 32, "adapter_rank": 8}
    | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]}
    | {"kv_channels": 16, "num_query_groups": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

NOT_MADE: Mapping[str, str] = {
    "blt": "tables of 500,000 rows for hashes of bytes",
    "dots3_note": "towers for images and sound",
    "gemma3n": "needs timm",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "got_ocr2": "towers for images",
    "inkling2_text": "no forward pass in float64",
    "musicgen": "tokens of sound",
    "musicgen_melody": "tokens of sound",
    "phi4_multimodal": "towers for images and sound",
    "xglm": "no forward pass in float64",
    "xmod": "wants a language for each text",
}
"""Classes of which no small model can be made, or none that reads text, and why."""


def kinds() -> list[str]:
    """The `model_type` of every causal language model that can be made small."""
    every = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    return sorted(every - {*NOT_MADE})


def small_config(kind: str) -> PreTrainedConfig:
    """Make the small configuration of a `model_type`."""
    classes = [config for config in MODEL_FOR_CAUSAL_LM_MAPPING if config.model_type == kind]
    return _small(classes[0])


def _small(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    default, needs = cls(), NEEDS.get(cls.model_type, {})
    fields: dict[str, Any] = {
        cls.attribute_map.get(name, name): value
        for name, value in SIZES.items()
        if _has(cls, default, name)
    }
    if "qk_rope_head_dim" in fields:  # latent attention: a key's width is that of its two parts
        fields |= {"num_key_value_heads": 4, "head_dim": 8}
    if own := getattr(default, "layer_types", None):
        every = list(dict.fromkeys(own))
        fields["layer_types"] = (every * 2)[: max(2, len(every))]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    for name in cls.sub_configs:
        part = getattr(default, name, None)
        if part is not None and type(part) is not PreTrainedConfig:
            fields[name] = _small(type(part)).to_dict()
    given = fields | needs
    return cls(**{name: value for name, value in given.items() if value is not OWN})


def _has(cls: type[PreTrainedConfig], default: PreTrainedConfig, name: str) -> bool:
    if name in inspect.signature(cls.__init__).parameters or name in cls.attribute_map:
        return True
    if any(name in getattr(base, "__annotations__", {}) for base in cls.__mro__):
        return True
    try:
        return hasattr(default, name)
    except ValueError:  # it varies from layer to layer
        return False
