"""Build a tokenizer as transformers does, without importing transformers.

`AutoTokenizer` changes ``tokenizer.json``: it picks a class, some classes replace the normalizer,
the pre-tokenizer and options of the model, and tokens named in other files are added. Models are
trained on the resulting ids, so this module does the same as transformers 5.8 to 5.23. Training
compares both, and refuses to start if they differ.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from logratio.errors import LogratioError

Json = dict[str, Any]
Token = str | AddedToken

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""In the order in which transformers adds them."""

SPLITS = "split_special_tokens"
"""Key of tokenizer_config.json: tokenize special tokens in a text as ordinary text."""

_PLAIN = "TokenizersBackend"
_OF_MODEL = {
    "GPT2Tokenizer": (
        "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip "
        "instructblipvideo jais2 opt phi starcoder2"
    ),
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "LlamaTokenizer": "idefics idefics2",
    "CodeLlamaTokenizer": "code_llama",
    "CohereTokenizer": "aya_vision cohere cohere2",
    "GemmaTokenizer": (
        "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma "
        "shieldgemma2 t5gemma zaya"
    ),
    "Qwen2Tokenizer": (
        "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl "
        "lighton_ocr ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe "
        "qwen2_vl qwen3 qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe "
        "vibevoice"
    ),
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "XGLMTokenizer": "xglm",
    "OpenAIGPTTokenizer": "openai-gpt",
    "T5Tokenizer": "mt5 musicgen musicgen_melody switch_transformers t5",
    "BertTokenizer": "bert electra megatron-bert",
    _PLAIN: (
        "arctic aria canary chatlm cohere_asr ernie4_5 ernie4_5_moe flex_olmo fuyu glm glm4 "
        "glm4_moe glm4_moe_lite glm4v glm4v_moe gpt_bigcode granite granitemoe granitemoehybrid "
        "granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm internlm2 internlm3 iquestcoder "
        "jamba kimi_k25 kimi_linear kosmos-2 llava llava_next mimo_v2_flash minicpm3 minicpmv "
        "minimax_m2 ministral ministral3 mistral mistral3 mistral_large4 mixtral modernbert "
        "modernbert-decoder molmo molmo2 nemotron nvfp4 olmo2 olmo3 olmo_hybrid opencua openvla "
        "paddleocr_vl persimmon phi3 phi3_v phimoe pixtral smolvlm stablelm step3_vl umt5 vipllava "
        "voxtral"
    ),
}
_CLASS_OF_MODEL = {model: name for name, models in _OF_MODEL.items() for model in models.split()}
"""The class that transformers registers for each model type."""

_WRONG = (
    "arctic chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax "
    "hyperclovax_vision_v2 hyperclovax_vlm internlm2 internlm3 iquestcoder jamba llava "
    "llava_next minicpm3 minicpmv minimax_m2 modernbert modernbert-decoder molmo molmo2 "
    "nemotron nvfp4 opencua openvla paddleocr_vl phi3 phi3_v phimoe qwen2 qwen3_5 qwen3_5_moe "
    "qwen3_5_moe_text qwen4_exp siglip2 smolvlm step3_vl vipllava"
)
_DECLARED_WRONGLY = frozenset(_WRONG.split())
"""Model types whose registered class overrides the one in tokenizer_config.json."""

_OTHERS = (
    "Albert Barthez Bartpho BertJapanese Bert Bertweet BigBird BioGpt BlenderbotSmall "
    "Blenderbot ByT5 CLIP CTRL Camembert Canine Clvp CodeGen CpmAnt Cpm DPRQuestionEncoder "
    "Deberta DebertaV2 DistilBert Electra Esm Esmc FSMT Flaubert Funnel GPTNeoXJapanese "
    "Herbert Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke MBart50 MBart MPNet MarkupLM MyT5 Nllb "
    "Nougat OpenAIGPT PLBart Pegasus Perceiver Phobert ProphetNet Reformer RemBert RoCBert "
    "RoFormer Roberta SeamlessM4T Siglip2 Splinter T5 Tapas Udop VideoPrism Vits Wav2Vec2CTC "
    "Whisper XGLM XLMRoberta XLM XLNet"
)
_NOT_FOLLOWED = frozenset(_OTHERS.split())
"""Classes (without "Tokenizer") whose changes to the tokenizer are not implemented here."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDOFTEXT = "<|endoftext|>"
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_DEFAULT_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _SENTENCEPIECE,
    "CodeLlamaTokenizer": _SENTENCEPIECE,
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _ENDOFTEXT),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _ENDOFTEXT)
    | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _ENDOFTEXT),
    "Qwen3_5Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _ENDOFTEXT),
    "GemmaTokenizer": {
        name: f"<{name.removesuffix('_token')}>"
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
}
"""Default named tokens of each class."""

_INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}


class TokenizerError(LogratioError, ValueError):
    """A tokenizer's folder is malformed, or its ids could differ from those of transformers."""


def class_of(declared: str | None, model_type: str | None, settings: Mapping[str, Any]) -> str:
    """Return the class that `AutoTokenizer` picks; "TokenizersBackend" leaves the file unchanged.

    Args:
        declared: The ``tokenizer_class`` of the folder, or None.
        model_type: The ``model_type`` of the model's config, or None.
        settings: The content of ``tokenizer.json``.
    """
    registered = _CLASS_OF_MODEL.get(model_type or "")
    if declared is None:
        return registered or _PLAIN
    bare = declared.removesuffix("Fast")
    if registered is None or registered == bare:
        chosen = bare
    elif registered == _PLAIN:
        return _PLAIN
    else:
        chosen = registered if model_type in _DECLARED_WRONGLY else bare
    is_bytes = bare == "LlamaTokenizer" and _is_byte_level(settings)
    if is_bytes and model_type not in _DECLARED_WRONGLY:
        return _PLAIN
    is_known = chosen in _DEFAULT_TOKENS or chosen.removesuffix("Tokenizer") in _NOT_FOLLOWED
    return chosen if is_known else _PLAIN


def _is_byte_level(settings: Mapping[str, Any]) -> bool:
    parts = [settings.get(name) or {} for name in ("pre_tokenizer", "decoder")]
    nested = [part for one in parts for part in one.get("pretokenizers", one.get("decoders", ()))]
    return any(part.get("type") == "ByteLevel" for part in (*parts, *nested))


def rebuilt(name: str, settings: Json, config: Mapping[str, Any], where: Path) -> Json:
    """Return ``tokenizer.json`` as a class of transformers rebuilds it, without added tokens.

    Args:
        name: The result of `class_of`.
        settings: The content of ``tokenizer.json``.
        config: The content of ``tokenizer_config.json``.
        where: The folder, for errors.

    Raises:
        TokenizerError: The class is not implemented here, or does not match the file.
    """
    if name == _PLAIN:
        return settings
    save = "load it with AutoTokenizer, check its ids, and save its backend_tokenizer to "
    remedy = f"{save}tokenizer.json with the tokenizer_class PreTrainedTokenizerFast"
    if name not in _DEFAULT_TOKENS:
        raise TokenizerError(
            f"{where}: transformers reads tokenizer.json with the class {name}, which replaces "
            f"parts of it in a way that is not implemented here: {remedy}"
        )
    model = settings["model"]
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(
            f"{where}: the class {name} builds a BPE tokenizer, but tokenizer.json holds "
            f"{model.get('type')}: {remedy}"
        )
    kept = {"type": "BPE", "vocab": model["vocab"], "merges": model["merges"]}
    parts = _parts(name, config)
    return {**settings, **parts, "model": kept | parts["model"], "added_tokens": []}


def _parts(name: str, config: Mapping[str, Any]) -> Json:
    """Return the normalizer, the pre-tokenizer and the model's options of a class."""
    space = config.get("add_prefix_space")
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    if name in ("LlamaTokenizer", "CodeLlamaTokenizer"):
        scheme = "always" if config.get("legacy", False) and name == "LlamaTokenizer" else "first"
        unknown = {"unk_token": _text(config.get("unk_token", "<unk>"))}
        return {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "never" if space is False else scheme,
                "split": False,
            },
            "model": {"fuse_unk": True, "byte_fallback": True}
            | (unknown if name == "CodeLlamaTokenizer" else {}),
        }
    if name == "GemmaTokenizer":
        return {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": _split({"String": " "}, "MergedWithPrevious"),
            "model": {
                "fuse_unk": True,
                "byte_fallback": True,
                "unk_token": _text(config.get("unk_token", "<unk>")),
            },
        }
    if name in ("Qwen2Tokenizer", "Qwen3_5Tokenizer"):
        pattern = {"Regex": _QWEN2 if name == "Qwen2Tokenizer" else _QWEN3_5}
        parts = [_split(pattern, "Isolated"), _bytes(bool(space), use_regex=False)]
    elif name == "CohereTokenizer":
        parts = [{"type": "Digits", "individual_digits": True}, _bytes(bool(space))]
    else:
        parts = [_bytes(bool(space))]
    return {
        "normalizer": None if name == "GPT2Tokenizer" else {"type": "NFC"},
        "pre_tokenizer": parts[0]
        if len(parts) == 1
        else {"type": "Sequence", "pretokenizers": parts},
        "model": affixes,
    }


def _split(pattern: Json, behavior: str) -> Json:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def _bytes(add_prefix_space: bool, *, use_regex: bool = True) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


class Naming:
    """The tokens that a folder's other files add to ``tokenizer.json``.

    Attributes:
        special: Named and model-specific special tokens by name, including the class's defaults.
        extra: Special tokens without a name.
        added: Tokens to add, in order.
    """

    def __init__(
        self, name: str, config: Json, older: Json, added: Mapping[str, int], own: list[Json]
    ) -> None:
        """Merge the files as `PreTrainedTokenizerBase.from_pretrained` does.

        Args:
            name: The class.
            config: ``tokenizer_config.json``.
            older: ``special_tokens_map.json``; ignored if `config` has an
                ``added_tokens_decoder``.
            added: ``added_tokens.json``, ids by text; ignored in the same case.
            own: The added tokens of ``tokenizer.json``.
        """
        values = dict(config)
        if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
            values["extra_special_tokens"] = values.pop("additional_special_tokens")
        decoder: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in config:
            listed = config["added_tokens_decoder"].items()
            decoder = {int(number): added_token(token) for number, token in listed}
        else:
            values |= _older(older, values)
            specials = {_text(values[n]) for n in NAMED_TOKENS if values.get(n)}
            specials |= {_text(token) for token in values.get("extra_special_tokens") or ()}
            for text, number in added.items():
                is_special = text in specials
                decoder[number] = AddedToken(text, normalized=not is_special, special=is_special)
            decoder |= {token["id"]: added_token(token) for token in own}
        if "extra_special_tokens" not in values:
            values["extra_special_tokens"] = values.get("additional_special_tokens")
        self.special = self._named(name, values, {str(token): token for token in decoder.values()})
        extra = values.get("extra_special_tokens") or ()
        self.extra = [] if isinstance(extra, Mapping) else [_token(token) for token in extra]
        self.added = [token for _, token in sorted(decoder.items(), key=lambda item: item[0])]

    @staticmethod
    def _named(name: str, values: Json, known: Mapping[str, AddedToken]) -> dict[str, Token]:
        """Return the tokens with a name: the usual ones, then the model-specific ones."""
        usual = _DEFAULT_TOKENS.get(name, {}) | {n: values[n] for n in NAMED_TOKENS if n in values}
        found = {n: _token(usual[n]) for n in NAMED_TOKENS if usual.get(n) is not None}
        found = {n: known.get(str(token), token) for n, token in found.items()}
        own = _INFILLING.copy() if name == "CodeLlamaTokenizer" else {}
        own |= {n: v for n, v in values.items() if n.endswith("_token") and n not in NAMED_TOKENS}
        if isinstance(values.get("extra_special_tokens"), Mapping):
            own |= values["extra_special_tokens"]
        return found | {n: _token(v) for n, v in own.items() if isinstance(v, str | Mapping)}

    def missing(self, present: set[str]) -> Iterator[AddedToken]:
        """Yield the tokens to add, in order; the special ones only if they are not `present`."""
        named = {str(token) for token in self.special.values()}
        for token in self.added:
            if str(token) in named and not token.special:
                token.special = True
            yield token
        seen = present | {str(token) for token in self.added}
        for one in (*self.special.values(), *self.extra):
            if str(one) not in seen:
                seen.add(str(one))
                yield one if isinstance(one, AddedToken) else AddedToken(one, special=True)


def _older(older: Json, values: Json) -> Json:
    """Read special_tokens_map.json: its tokens are always special."""
    found: Json = {}
    for name, value in older.items():
        if name == "extra_special_tokens" and isinstance(value, list):
            extra = list(values.get("extra_special_tokens") or ())
            value = extra + [token for token in value if token not in extra]
        elif isinstance(value, dict) and name != "extra_special_tokens":
            value = {**value, "special": True}
        found[name] = value
    return found


def added_token(token: Any) -> AddedToken:
    """Build an added token from its entry in a file.

    Raises:
        TokenizerError: The entry is malformed.
    """
    try:
        flags = {key: value for key, value in token.items() if key not in ("__type", "id")}
        return AddedToken(flags.pop("content"), **flags)
    except (TypeError, AttributeError, KeyError) as error:
        raise TokenizerError(f"an added token is malformed: {token!r}") from error


def _token(value: Any) -> Token:
    return value if isinstance(value, str) else added_token(value)


def finished(tokenizer: Tokenizer, name: str, naming: Naming) -> None:
    """Add the tokens that a folder names, as the class's constructor does."""
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(list(naming.missing(present)))
    everything = dict.fromkeys(map(str, (*naming.special.values(), *naming.extra)))
    if name == "Qwen2Tokenizer":
        tokenizer.add_tokens([AddedToken(token, special=True) for token in everything])
    elif name == "CohereTokenizer":
        tokens = [
            token if isinstance(token, AddedToken) else AddedToken(token, special=True)
            for token in (*naming.special.values(), *naming.extra)
        ]
        tokenizer.add_special_tokens(tokens)
    elif name == "GPTNeoXTokenizer":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    elif name == "CodeLlamaTokenizer":
        bos = str(naming.special["bos_token"])
        opening = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=opening
        )


def heads(settings: Mapping[str, Any]) -> str:
    """Return the parts of ``tokenizer.json`` that determine ids, except the vocabulary, as JSON."""
    model = {k: v for k, v in settings["model"].items() if k not in ("vocab", "merges")}
    names = ("normalizer", "pre_tokenizer", "post_processor", "added_tokens", SPLITS)
    return json.dumps([model, *(settings.get(name) for name in names)], sort_keys=True)
