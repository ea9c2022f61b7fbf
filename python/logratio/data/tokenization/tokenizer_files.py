"""Read and write a tokenizer's folder without transformers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from logratio.data.tokenization.tokenizer_classes import (
    NAMED_TOKENS,
    SPLITS,
    Naming,
    TokenizerError,
    class_of,
    finished,
    heads,
    rebuilt,
)
from logratio.errors import MissingInputError, fetching_advice
from logratio.hub import HubError, local_folder

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The parsed files of a tokenizer's folder.

    Attributes:
        tokenizer: The tokenizer, without truncation and padding.
        special_tokens: The named special tokens, ``bos_token`` and so on, as text.
        chat_template: The template's text, or None.
        opening_ids: The ids that the tokenizer prepends to a text: usually [bos] or nothing.
        digest: SHA-256 (hex) of all the above; equal digests give equal ids.
        settings: The content of ``tokenizer.json``, with the additions of other files.
        stop_ids: Tokens that end an answer, ascending: those of generation_config.json and
            config.json, and EOS.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | None
    opening_ids: tuple[int, ...]
    digest: str
    settings: Json
    stop_ids: tuple[int, ...] = ()

    def id_of(self, name: str) -> int | None:
        """Return the id of a named special token, or None."""
        token = self.special_tokens.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)


def read_tokenizer(
    folder: Path, chat_template: str | None = None, *, as_written: bool = False
) -> TokenizerFiles:
    """Read a tokenizer's folder as `AutoTokenizer` of transformers reads it.

    Args:
        folder: Folder with ``tokenizer.json`` and usually ``tokenizer_config.json``, or an id of
            the Hugging Face hub. The model's ``config.json`` (of the base, for an adapter) helps
            to choose the class.
        chat_template: Replaces the folder's template.
        as_written: Use ``tokenizer.json`` without the class and tokens that other files name. For
            the complete folders of `write_tokenizer`.

    Raises:
        OSError: The folder or its ``tokenizer.json`` is missing or cannot be read.
        TokenizerError: A file is malformed or names an unknown token, or transformers reads the
            folder in a way that is not implemented here.
    """
    folder = local_folder(folder, weights=False)
    content = _tokenizer_json(folder)
    tokenizer, settings = _parsed(content, folder), json.loads(content)
    config, older = (
        _object(folder, "tokenizer_config.json"),
        _object(folder, "special_tokens_map.json"),
    )
    model_config = _object(_model_folder(folder), "config.json")
    own = sha256(content).digest()
    special: dict[str, str] = {}
    if as_written:
        tokenizer.encode_special_tokens = bool(config.get(SPLITS))
    else:
        tokenizer, special, is_new = _resolved(tokenizer, settings, folder, model_config)
        older = {n: t for n, t in older.items() if _is_token(tokenizer, t)}
        if is_new:
            settings = _settings_of(tokenizer, settings)
            own = sha256(own + heads(settings).encode()).digest()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = _texts(older | config) | special
    for name, token in special.items():
        if tokenizer.token_to_id(token) is None:
            raise TokenizerError(f"{folder}: the {name} {token!r} is not in tokenizer.json")
    template = _template(folder, config) if chat_template is None else chat_template
    opening = _opening_ids(tokenizer)
    decided = json.dumps([special, template, opening], sort_keys=True)
    digest = sha256(own + decided.encode("utf-8", "surrogatepass"))
    stops = _stop_ids(folder, model_config)
    if (eos := special.get("eos_token")) is not None:
        stops.add(int(tokenizer.token_to_id(eos) or 0))
    return TokenizerFiles(
        tokenizer,
        special,
        template,
        opening,
        digest.hexdigest(),
        settings,
        tuple(sorted(stops)),
    )


def write_tokenizer(files: TokenizerFiles, folder: Path) -> list[str]:
    """Write a tokenizer so that its folder alone gives the same ids.

    ``tokenizer.json`` then includes the additions of the model's config and other files.

    Returns:
        The names of the written files.
    """
    config: Json = {"tokenizer_class": "PreTrainedTokenizerFast", **files.special_tokens}
    if files.tokenizer.encode_special_tokens:
        config[SPLITS] = True
    texts = {
        "tokenizer.json": files.tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=1),
    }
    if files.chat_template is not None:
        texts["chat_template.jinja"] = files.chat_template
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    return [*texts]


def _parsed(content: bytes, folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error


def _resolved(
    tokenizer: Tokenizer, settings: Json, folder: Path, model_config: Json
) -> tuple[Tokenizer, dict[str, str], bool]:
    """Build the tokenizer that transformers builds from a folder.

    Returns:
        The tokenizer, its named special tokens, and whether it differs from ``tokenizer.json``.
    """
    config = _object(folder, "tokenizer_config.json")
    declared = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    name = class_of(declared, model_config.get("model_type"), settings)
    naming = Naming(
        name,
        config,
        _object(folder, "special_tokens_map.json"),
        _object(folder, "added_tokens.json"),
        settings.get("added_tokens", []),
    )
    before = heads(_settings_of(tokenizer, settings))
    built = rebuilt(name, settings, config, folder)
    if built is not settings:
        tokenizer = _parsed(json.dumps(built).encode(), folder)
    finished(tokenizer, name, naming)
    tokenizer.encode_special_tokens = bool(config.get(SPLITS))
    special = {key: str(token) for key, token in naming.special.items() if key in NAMED_TOKENS}
    is_new = heads(_settings_of(tokenizer, settings)) != before
    return tokenizer, special, is_new


def _settings_of(tokenizer: Tokenizer, settings: Json) -> Json:
    """Return a tokenizer as ``tokenizer.json`` content, with the vocabulary of `settings`."""
    model = tokenizer.model
    options = {
        name: getattr(model, name)
        for name in (
            *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
            *("fuse_unk", "byte_fallback", "ignore_merges"),
        )
        if hasattr(model, name)
    }
    added = tokenizer.get_added_tokens_decoder()
    parts = {
        name: part and json.loads(part.__getstate__())
        for name in ("normalizer", "pre_tokenizer", "post_processor")
        for part in [getattr(tokenizer, name)]
    }
    return {
        **settings,
        **parts,
        SPLITS: tokenizer.encode_special_tokens or None,
        "model": settings["model"] | options,
        "added_tokens": [
            {"id": number, "content": token.content}
            | {flag: getattr(token, flag) for flag in _FLAGS}
            for number, token in sorted(added.items())
        ],
    }


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _tokenizer_json(folder: Path) -> bytes:
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder{fetching_advice(folder, 'model')}")
    if not path.exists():
        raise MissingInputError(
            f"{folder}: the folder has no tokenizer.json. Create one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return path.read_bytes()


def _model_folder(folder: Path) -> Path:
    """Return the folder of the model's config: for an adapter, that of its base."""
    if (folder / "config.json").exists():
        return folder
    adapter = _object(folder, "adapter_config.json")
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str):
        return folder
    if not Path(base).exists() and (folder / base).exists():
        return folder / base
    try:
        return local_folder(base, adapter.get("revision"), weights=False)
    except HubError:  # the tokenizer may be complete without the base's config
        return folder


def _object(folder: Path, name: str) -> Json:
    """Read a JSON object; empty if the file does not exist."""
    path = folder / name
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return found


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in NAMED_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _is_token(tokenizer: Tokenizer, value: Any) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and tokenizer.token_to_id(text) is not None


def _stop_ids(folder: Path, model_config: Json) -> set[int]:
    """Return the EOS ids in generation_config.json and in the model's config."""
    generation = _object(_generation_folder(folder), "generation_config.json")
    text = model_config.get("text_config")
    stops: set[int] = set()
    for config in (generation, model_config, text if isinstance(text, dict) else {}):
        value = config.get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        stops |= {number for number in listed if type(number) is int and number >= 0}
    return stops


def _generation_folder(folder: Path) -> Path:
    return folder if (folder / "generation_config.json").exists() else _model_folder(folder)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            names = ", ".join(named)
            raise TokenizerError(
                f"{folder} has the chat templates {names} and no default: choose one"
            )
        template = named["default"]
    return template


def _opening_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that the post-processor prepends to a text.

    Like transformers, this ignores ``add_bos_token`` in tokenizer_config.json.
    """
    probe = tokenizer.encode("a", add_special_tokens=True)
    count = next((i for i, n in enumerate(probe.sequence_ids) if n is not None), 0)
    return tuple(probe.ids[:count])


def splitting(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer that splits special tokens as text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy
