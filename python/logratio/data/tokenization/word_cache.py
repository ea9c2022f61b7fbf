"""Cache of word ids for tokenizers that allow it.

A byte-level tokenizer splits text by a pattern before it merges bytes. None of the patterns below
matches across a visible ASCII character and the space after it. So the ids of a text are the
concatenated ids of its pieces, and most pieces are words that were already encoded.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from logratio._rust import EncodedPairs, PairRules, PieceTable

CAPACITY = 32 << 20
"""Bytes of text in the table; when it is full, it is cleared."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"'(?i:[sdmt]|ll|ve|re)",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
)
_NUMBERS = (r"\p{N}", r"\p{N}{1,3}")
_WORDS = r"[^\r\n\p{L}\p{N}]?%s+|%s| ?[^\s%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = ((r"\p{L}", r"\p{L}"), (r"[\p{L}\p{M}]", r"\p{L}\p{M}"))
PATTERNS = frozenset(
    f"{contractions}|{_WORDS % (letter, number, letters)}"
    for contractions in _CONTRACTIONS
    for number in _NUMBERS
    for letter, letters in _LETTERS
) | {_GPT2}
"""Patterns of GPT-2, GPT-4, Llama 3, Qwen and the models that use the same: a match that contains
a visible character ends before the next space."""

_HARMLESS = ("Digits", "ByteLevel")  # they split further, and join nothing
_PROBE = (
    "\n\nHuman: It's 12,345 things;  isn't it?\n\n \tAssistant: (Yes)  — “naïve” e\u0301 日 語!\r\n"
    "x = [1, 2]  # done\n   end  \u00a0 we'LL \u200b see… 🙂 🙂\n"
)


class PieceEncoder:
    """Encodes texts exactly as their tokenizer does, with a cache of pieces.

    Attributes:
        is_exact: Whether the cache gives exact ids; otherwise the tokenizer encodes every text.
        unknown_id: The token for unknown text, which may cover any number of characters. None: the
            tokenizer can encode every text.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
        """Check whether the tokenizer allows a cache.

        Args:
            tokenizer: The tokenizer, without truncation and padding.
            settings: The content of its ``tokenizer.json``.
        """
        self._tokenizer = tokenizer
        self._table = PieceTable(CAPACITY)
        self.unknown_id = _unknown_id(tokenizer, settings["model"])
        self.is_exact = _is_local(settings) and self._agrees(_PROBE)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without added special tokens."""
        if not self.is_exact:
            return self._whole(texts)
        ids, offsets = self._table.encode(texts, self._whole)
        flat = ids.tolist()
        return [flat[start:end] for start, end in pairwise(offsets.tolist())]

    def end_of(self, text: str, tokens: int) -> int:
        """Return the number of characters that the first `tokens` tokens of a text cover."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return int(encoding.offsets[tokens - 1][1])

    def encode_pairs(self, columns: Sequence[Any], rules: PairRules) -> EncodedPairs:
        """Encode rows of prompt, chosen and rejected, except odd ones. Requires `is_exact`.

        Args:
            columns: Three lists of strings, or three pairs of bytes and offsets.
            rules: Rules by which a row is encoded or odd.
        """
        prompts, chosen, rejected = columns
        return self._table.encode_pairs(prompts, chosen, rejected, rules, self._whole)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _agrees(self, text: str) -> bool:
        ids, _ = self._table.encode([text], self._whole)
        return bool(ids.tolist() == self._whole([text])[0])


def _is_local(settings: Mapping[str, Any]) -> bool:
    """Return whether the ids of a piece are independent of the text around it."""
    model = settings["model"]
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and (model.get("unk_token") is None or _knows_all_bytes(model))
        and _keeps_spaces(settings.get("normalizer"))
        and _splits_at_spaces(settings.get("pre_tokenizer"))
        and all(_is_word(token) for token in settings.get("added_tokens", ()))
    )


def _unknown_id(tokenizer: Tokenizer, model: Mapping[str, Any]) -> int | None:
    if model.get("type") == "Unigram":
        return model.get("unk_id")
    token = model.get("unk_token")
    if token is None or _knows_all_bytes(model):
        return None
    return tokenizer.token_to_id(token)


def _knows_all_bytes(model: Mapping[str, Any]) -> bool:
    """Return whether a byte-level vocabulary has every byte, so that no text is unknown."""
    return set(model["vocab"]) >= set(pre_tokenizers.ByteLevel.alphabet())


def _keeps_spaces(normalizer: Mapping[str, Any] | None) -> bool:
    """Return whether the normalizer is none or NFC, which composes nothing with a space."""
    if normalizer is None or normalizer["type"] == "NFC":
        return True
    return normalizer["type"] == "Sequence" and all(
        _keeps_spaces(part) for part in normalizer["normalizers"]
    )


def _splits_at_spaces(splitter: Mapping[str, Any] | None) -> bool:
    """Return whether the tokenizer splits wherever the cache does, and keeps the bytes."""
    if splitter is None:
        return False
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    return (
        any(map(_splits, parts))
        and all(_splits(part) or part["type"] in _HARMLESS for part in parts)
        and not any(part.get("add_prefix_space") for part in parts)
    )


def _splits(part: Mapping[str, Any]) -> bool:
    if part["type"] == "ByteLevel":
        return bool(part.get("use_regex", True))
    if part["type"] != "Split":
        return False
    known = part["pattern"].get("Regex") in PATTERNS
    return known and part["behavior"] == "Isolated" and not part.get("invert")


def _is_word(token: Mapping[str, Any]) -> bool:
    """Return whether an added token, matched in the raw text, cannot cross a split."""
    is_plain = not (token.get("rstrip") or token.get("single_word"))
    return is_plain and not any(character.isspace() for character in token["content"])
