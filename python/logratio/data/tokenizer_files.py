"""A tokenizer's folder: tokenizer.json, its special tokens, its chat template; no transformers."""

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a tokenizer's folder says.

    Attributes:
        tokenizer: Text to ids, without truncation and padding of its own.
        special_tokens: The named special tokens, ``bos_token`` and so on, as text.
        chat_template: The template's text, if there is one.
        opening_ids: What the tokenizer puts before a text by itself: usually [bos] or nothing.
        digest: SHA-256 (hex) of all the above: equal digests encode equally.
        settings: The content of ``tokenizer.json``.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, str]
    chat_template: str | None
    opening_ids: tuple[int, ...]
    digest: str
    settings: dict[str, Any]

    def id_of(self, name: str) -> int | None:
        """Return the id of a named special token, or None where the folder names none."""
        token = self.special_tokens.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)


def read_tokenizer(folder: Path, chat_template: str | None = None) -> TokenizerFiles:
    """Read a tokenizer's folder.

    Args:
        folder: Holds ``tokenizer.json`` and usually ``tokenizer_config.json``.
        chat_template: Replaces the folder's own template.

    Raises:
        OSError: The folder or its ``tokenizer.json`` is missing or cannot be read.
        ValueError: A file is malformed, or names a token that the tokenizer does not have.
    """
    content = _tokenizer_json(folder)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _config(folder)
    special_tokens = _special_tokens(config)
    for name, token in special_tokens.items():
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{folder}: the {name} {token!r} is no token of tokenizer.json")
    template = _template(folder, config) if chat_template is None else chat_template
    opening = _opening_ids(tokenizer)
    decided = json.dumps([special_tokens, template, opening], sort_keys=True)
    digest = sha256(sha256(content).digest() + decided.encode("utf-8", "surrogatepass"))
    return TokenizerFiles(
        tokenizer, special_tokens, template, opening, digest.hexdigest(), json.loads(content)
    )


def _tokenizer_json(folder: Path) -> bytes:
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(folder))
    if not path.exists():
        raise FileNotFoundError(
            errno.ENOENT,
            "The folder holds no tokenizer.json. Make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            str(folder),
        )
    return path.read_bytes()


def _config(folder: Path) -> dict[str, Any]:
    """Merge the folder's two files of settings; tokenizer_config.json has the last word."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            merged |= json.loads(path.read_text("utf-8"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a JSON object: {error}") from error
    return merged


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in NAMED_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            names = ", ".join(named)
            raise ValueError(f"{folder} has the chat templates {names} and no default: choose one")
        template = named["default"]
    return template


def _opening_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Find what the post-processor puts in front of a text.

    tokenizer_config.json may say ``add_bos_token`` too; where there is a tokenizer.json,
    transformers does not listen to it, and neither do we.
    """
    probe = tokenizer.encode("a", add_special_tokens=True)
    count = next((i for i, n in enumerate(probe.sequence_ids) if n is not None), 0)
    return tuple(probe.ids[:count])


def splitting(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer; the copy reads special tokens as text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy
