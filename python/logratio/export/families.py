"""The model families that can be exported, in which layout, and why others are refused."""

import re
from collections.abc import Mapping

import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

from logratio.bundle import PADDED, SHARED_PROMPT
from logratio.logps.checks import UnsupportedModelError
from logratio.logps.completion import limits_of

_SHARED = """
apertus arcee biogpt bitnet bloom codegen cohere cohere2 cwm deepseek_v3 dots1 ernie4_5 ernie4_5_moe
exaone4 falcon flex_olmo gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode
gpt_neo gpt_neox gpt_neox_japanese gpt_oss granite granitemoe granitemoeshared helium
hunyuan_v1_dense hyperclovax internlm3 jais2 llama mimo_v2_flash minimax_m2 ministral
ministral3 mistral mixtral nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma
"""
_CONVOLUTIONS = "lfm2 lfm2_moe lfm3"
_RECURRENT = """
bamba falcon_h1 granitemoehybrid mamba2 nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text
qwen3_next zamba2
"""
_RECURRENT_SINCE = "5.15"
"""The first transformers whose recurrent layers call a function that `recurrences` can replace."""
FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(_SHARED.split(), SHARED_PROMPT),
    **dict.fromkeys(f"{_CONVOLUTIONS} {_RECURRENT}".split(), PADDED),
}
"""The layout of the graph of each `model_type` that a test compares with torch."""

_REASONS: Mapping[str, str] = {
    "it is an encoder-decoder": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp "
    "pegasus plbart prophetnet whisper",
    "the log-prob engine does not support its head": "bert big_bird camembert data2vec-text "
    "electra ernie inkling_text llama4 llama4_text megatron-bert modernbert-decoder rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xlstm",
    "it is not causal, or draws at random": "bert-generation cpmant reformer xlm xlnet",
    "it takes images or sound": "emu3 fuyu gemma3 gemma4 gemma4_unified git mllama moshi "
    "moss_transcribe_diarize qwen3_5 qwen3_5_moe qwen4_exp trocr",
    "its attention selects among all tokens of a row, so that padding would change its log-probs": (
        "axk2 deepseek_v32 deepseek_v4 doge dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text "
        "qwen4_exp_text"
    ),
    "its layers carry a state across tokens, and no test shows that its graph is right at every "
    "length": "bailing_hybrid falcon_mamba jamba kimi_linear mamba minimax recurrent_gemma rwkv "
    "zamba",
    "the exporter cannot write its code": "dbrx deepseek_v2 mpt",
    "its graph has an operator that no bundle may contain (Tile)": "gptj jetmoe",
}
REFUSED: Mapping[str, str] = {
    kind: reason for reason, kinds in _REASONS.items() for kind in kinds.split()
}
"""Why a `model_type` cannot be exported; others are refused because no test compares them."""

_STATE = re.compile("linear|conv|hybrid|mamba|ssm|recurrent|rwkv")
_UNLIMITED = 2**30
_POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length")


def check_exportable(config: PreTrainedConfig, max_length: int) -> None:
    """Check that a model can be exported exactly.

    Args:
        config: Config of a causal language model.
        max_length: Maximum tokens of prompt + completion.

    Raises:
        UnsupportedModelError: It cannot; the message gives the reason.
    """
    name = f"a {config.model_type} model"
    if reason := _why_not(config):
        raise UnsupportedModelError(
            f"{name} cannot be exported: {reason}. Use torch instead: `logratio evaluate`"
        )
    if max_length > max_positions(config):
        raise UnsupportedModelError(
            f"{name} with {max_positions(config)} positions cannot score {max_length} tokens"
        )
    for limit in limits_of(config):
        if max_length > limit.tokens:
            raise UnsupportedModelError(
                f"{name}: {limit.what} computes sequences above {limit.tokens} tokens in another "
                f"way, which a graph cannot do, and the rules allow {max_length} tokens"
            )


def _why_not(config: PreTrainedConfig) -> str | None:
    """Return the reason why a family, or this model of a family, cannot be exported."""
    layout = FAMILIES.get(config.model_type)
    if layout is None:
        other = "no test compares the graph of this family with torch"
        return REFUSED.get(config.model_type, other)
    types = {*(getattr(config, "layer_types", None) or ())}
    if layout == SHARED_PROMPT and (found := sorted(filter(_STATE.search, types))):
        return f"it has layers that carry a state across tokens ({', '.join(found)})"
    installed = transformers.__version__
    if config.model_type in _RECURRENT.split() and Version(installed) < Version(_RECURRENT_SINCE):
        since = f"transformers {_RECURRENT_SINCE} or newer"
        return f"its recurrent layers need {since}, and {installed} is installed"
    return None


def layout_of(*configs: PreTrainedConfig) -> str:
    """Return the layout of a graph of these models: padded if one of them needs it."""
    layouts = {FAMILIES.get(config.model_type, SHARED_PROMPT) for config in configs}
    return PADDED if PADDED in layouts else SHARED_PROMPT


def max_positions(config: PreTrainedConfig) -> int:
    """Return the longest sequence that a model supports, in tokens."""
    found = (getattr(config, name, None) for name in _POSITIONS)
    return next((int(value) for value in found if value), _UNLIMITED)


def not_quantizable(config: PreTrainedConfig) -> str | None:
    """Return the part of a model whose weights cannot be stored in 8 or 4 bits, or None."""
    if FAMILIES.get(config.model_type) == PADDED:
        return "layers that carry a state (padded layout)"
    is_mixture = any("expert" in key and value for key, value in config.to_dict().items())
    return "experts" if is_mixture else None
