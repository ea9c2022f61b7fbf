"""Tokenizer folders: ids equal those of transformers' AutoTokenizer, or the folder is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from tokenizers_for_tests import (
    SENTENCES,
    SPECIAL,
    byte_level,
    save,
    unigram,
    whole_text,
    with_bos,
    word_piece,
)
from tokenizers_for_tests import word_level as words
from transformers import AutoTokenizer

from logratio.data import PreferenceTokenizer
from logratio.data.tokenization.tokenizer_classes import TokenizerError
from logratio.data.tokenization.tokenizer_files import read_tokenizer, write_tokenizer

TEXTS = (
    "the cat sat on the mat",
    " how are you?  I am fine",
    "the <extra> cat<extra>sat <turn>and<turn> dog",
    "<s> the </s> cat <|im_end|>\nand",
    "The CAT isn't naïve e\u0301, 漢 🙂 12345",
    "<extra>",
    "dogs<turn>  ",
    "\n\nwhat\t is  it",
)


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "bos": lambda: with_bos(byte_level()),
    "text": whole_text,
    "words": words,
    "pieces": word_piece,
    "unigram": unigram,
    "metaspace": metaspace,
}


def flagged(content: str, **flags: bool) -> dict[str, Any]:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "special": False, **usual, **flags}


EXTRA = flagged("<extra>", special=True)
LATE = {"999": EXTRA, "1000": flagged("<turn>")}
FAST = "PreTrainedTokenizerFast"

Layout = tuple[str, dict[str, Any], dict[str, Any]]
"""Kind, tokenizer_config.json, other files by name."""

READ: dict[str, Layout] = {
    "nothing else": ("bytes", {}, {}),
    "decoder": ("bytes", {"added_tokens_decoder": LATE}, {}),
    "decoder and bos": ("bos", {"added_tokens_decoder": LATE}, {}),
    "decoder, words": ("words", {"added_tokens_decoder": LATE}, {}),
    "decoder, pieces": ("pieces", {"added_tokens_decoder": LATE}, {}),
    "decoder, unigram": ("unigram", {"added_tokens_decoder": LATE}, {}),
    "decoder, metaspace": ("metaspace", {"added_tokens_decoder": LATE}, {}),
    "lstrip": ("bytes", {"added_tokens_decoder": {"900": flagged("<extra>", lstrip=True)}}, {}),
    "rstrip": ("bytes", {"added_tokens_decoder": {"900": flagged("<extra>", rstrip=True)}}, {}),
    "both, words": (
        "words",
        {"added_tokens_decoder": {"9": flagged("<extra>", lstrip=True, rstrip=True)}},
        {},
    ),
    "single word": (
        "bytes",
        {"added_tokens_decoder": {"900": flagged("dog", single_word=True)}},
        {},
    ),
    "normalized": (
        "pieces",
        {"added_tokens_decoder": {"900": flagged("CAT", normalized=True)}},
        {},
    ),
    "a word of the vocabulary": (
        "words",
        {"added_tokens_decoder": {"6": flagged("cat", special=True)}},
        {},
    ),
    "added_tokens.json": ("bytes", {}, {"added_tokens.json": {"<turn>": 401, "<extra>": 400}}),
    "added_tokens.json, special": (
        "text",
        {"additional_special_tokens": ["<extra>"]},
        {"added_tokens.json": {"<extra>": 700, "<turn>": 701}},
    ),
    "added_tokens.json next to a decoder": (
        "bytes",
        {"added_tokens_decoder": {"900": EXTRA}},
        {"added_tokens.json": {"<turn>": 901}},
    ),
    "additional": ("bytes", {"additional_special_tokens": ["<extra>", "<turn>"]}, {}),
    "additional, unigram": ("unigram", {"additional_special_tokens": ["<extra>"]}, {}),
    "extra": ("bytes", {"extra_special_tokens": ["<turn>", "<extra>"]}, {}),
    "extra by name": ("bytes", {"extra_special_tokens": {"turn_token": "<turn>"}}, {}),
    "extra and additional": (
        "bytes",
        {"extra_special_tokens": ["<turn>"], "additional_special_tokens": ["<extra>"]},
        {},
    ),
    "a token of the model's own": ("metaspace", {"image_token": "<extra>"}, {}),
    "older map": (
        "bytes",
        {"eos_token": None},
        {"special_tokens_map.json": {"eos_token": "<turn>", "pad_token": flagged("<extra>")}},
    ),
    "older map, additional": (
        "bytes",
        {},
        {"special_tokens_map.json": {"additional_special_tokens": ["<extra>"]}},
    ),
    "older map next to a decoder": (
        "bytes",
        {"added_tokens_decoder": {"900": EXTRA}},
        {"special_tokens_map.json": {"mask_token": "<turn>"}},
    ),
    "a pad token that is new": ("bytes", {"pad_token": "<extra>"}, {}),
    "add_bos_token": ("bytes", {"add_bos_token": True}, {}),
    "add_bos_token off": ("bos", {"add_bos_token": False, "add_eos_token": True}, {}),
    "split special tokens": ("bytes", {"split_special_tokens": True}, {}),
    "no class": ("bytes", {"tokenizer_class": None}, {}),
    "no class, gpt2": ("bytes", {"tokenizer_class": None}, {"config.json": {"model_type": "gpt2"}}),
    "unknown class": ("pieces", {"tokenizer_class": "HouseTokenizer"}, {}),
    "bloom": ("bytes", {"tokenizer_class": "BloomTokenizerFast"}, {}),
    "gpt2": ("bytes", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "gpt2, prefix space": (
        "bytes",
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
        {},
    ),
    "gpt2 of a text": ("text", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "qwen2": (
        "bytes",
        {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": LATE},
        {"config.json": {"model_type": "qwen2"}},
    ),
    "qwen3 with bos": (
        "bos",
        {"tokenizer_class": "Qwen2TokenizerFast", "bos_token": None},
        {"config.json": {"model_type": "qwen3"}},
    ),
    "qwen2 named otherwise": (
        "bytes",
        {"tokenizer_class": "LlamaTokenizer"},
        {"config.json": {"model_type": "qwen2"}},
    ),
    "qwen3_5": ("bytes", {}, {"config.json": {"model_type": "qwen3_5_text"}}),
    "neox": ("bos", {"tokenizer_class": "GPTNeoXTokenizerFast"}, {}),
    "neox by its model": (
        "bos",
        {"tokenizer_class": None},
        {"config.json": {"model_type": "mamba"}},
    ),
    "gemma": ("metaspace", {"tokenizer_class": "GemmaTokenizer"}, {}),
    "gemma, decoder": (
        "text",
        {"tokenizer_class": "GemmaTokenizerFast", "added_tokens_decoder": LATE},
        {"config.json": {"model_type": "gemma2"}},
    ),
    "cohere": ("bos", {"tokenizer_class": "CohereTokenizerFast"}, {}),
    "llama": (
        "text",
        {"tokenizer_class": "LlamaTokenizer"},
        {"config.json": {"model_type": "llama"}},
    ),
    "llama, legacy": ("text", {"tokenizer_class": "LlamaTokenizer", "legacy": True}, {}),
    "llama, not legacy": (
        "metaspace",
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "added_tokens_decoder": LATE},
        {},
    ),
    "llama, no prefix space": (
        "text",
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
        {},
    ),
    "llama of bytes": (
        "bos",
        {"tokenizer_class": "LlamaTokenizer"},
        {"config.json": {"model_type": "llama"}},
    ),
    "mistral": (
        "text",
        {"tokenizer_class": "LlamaTokenizer"},
        {"config.json": {"model_type": "mistral"}},
    ),
    "phi3": (
        "text",
        {"tokenizer_class": "LlamaTokenizer"},
        {"config.json": {"model_type": "phi3"}},
    ),
    "code llama": ("text", {"tokenizer_class": "CodeLlamaTokenizer"}, {}),
}


def folder(path: Path, layout: Layout) -> Path:
    kind, config, files = layout
    save(path, KINDS[kind](), **{"tokenizer_class": FAST, **config})
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", READ)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path, READ[name])
    theirs, ours = AutoTokenizer.from_pretrained(path), read_tokenizer(path)
    for text in TEXTS:
        assert ours.tokenizer.encode(text).ids == theirs(text)["input_ids"], text
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.tokenizer.encode(text, add_special_tokens=False).ids == bare, text
    for token in ("bos", "eos", "pad", "unk"):
        id_ = getattr(theirs, f"{token}_token_id")
        assert id_ is None or ours.id_of(f"{token}_token") == id_, token


@pytest.mark.parametrize("name", ["decoder", "gemma, decoder", "older map", "qwen2", "unigram"])
def test_a_written_folder_alone_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    files = read_tokenizer(folder(tmp_path / "here", READ.get(name, ("unigram", {}, {}))))
    (tmp_path / "there").mkdir()
    write_tokenizer(files, tmp_path / "there")
    again = read_tokenizer(tmp_path / "there", as_written=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "there")
    assert again.special_tokens == files.special_tokens
    for text in TEXTS:
        ids = files.tokenizer.encode(text).ids
        assert again.tokenizer.encode(text).ids == theirs(text)["input_ids"] == ids


def test_a_text_is_encoded_with_the_added_tokens(tmp_path: Path) -> None:
    """The store is built with the word cache, which must handle them too."""
    path = folder(tmp_path, READ["lstrip"])
    theirs, ours = AutoTokenizer.from_pretrained(path), PreferenceTokenizer.load(path)
    for text in TEXTS:
        assert ours.encode_prompt(text) == theirs(text)["input_ids"], text
    assert ours.vocabulary_size == len(theirs)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (("pieces", {"tokenizer_class": "BertTokenizer"}, {}), "BertTokenizer"),
        (("unigram", {"tokenizer_class": "T5TokenizerFast"}, {}), "T5Tokenizer"),
        (("unigram", {"tokenizer_class": "LlamaTokenizer"}, {}), "holds Unigram"),
        (("pieces", {"tokenizer_class": "GPT2Tokenizer"}, {}), "holds WordPiece"),
        (("bytes", {"tokenizer_class": None}, {"config.json": {"model_type": "xglm"}}), "XGLM"),
        (("bytes", {"added_tokens_decoder": {"9": {"text": "<x>"}}}, {}), "malformed"),
    ],
)
def test_unsupported_classes_are_refused(layout: Layout, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=reason):
        read_tokenizer(folder(tmp_path, layout))


def test_a_folder_of_vocabulary_and_merges_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json.*save_pretrained"):
        read_tokenizer(tmp_path)


def test_an_adapter_is_read_like_its_base(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", ("bos", {}, {"config.json": {"model_type": "gpt_neox"}}))
    adapter = folder(tmp_path / "adapter", ("bos", {"tokenizer_class": None}, {}))
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert read_tokenizer(adapter).opening_ids == ()


def test_a_folder_that_needs_nothing_keeps_its_digest(tmp_path: Path) -> None:
    """Stores of earlier versions remain valid."""
    path = folder(tmp_path, READ["nothing else"])
    assert read_tokenizer(path).digest == read_tokenizer(path, as_written=True).digest
    (path / "added_tokens.json").write_text('{"<turn>": 400}')
    assert read_tokenizer(path).digest != read_tokenizer(path, as_written=True).digest


def test_an_added_token_twice_is_one(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<turn>", normalized=False)])
    path = save(tmp_path, tokenizer, added_tokens_decoder={"400": flagged("<turn>")})
    (path / "added_tokens.json").write_text('{"<turn>": 400}')
    assert read_tokenizer(path).digest == read_tokenizer(path, as_written=True).digest
