"""Text that is kept, and worth a warning."""

import re

from tokenizers import Tokenizer

from logratio.data.records import PreferenceRecord

_HEADERS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|\[/?INST\]|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|(?:user|assistant|system|User|Assistant)\|>|<\uff5c(?:User|Assistant)\uff5c>"
)
"""What the usual chat templates write before a turn."""


def text_notes(record: PreferenceRecord, spelled: re.Pattern[str] | None) -> list[str]:
    """Name what is odd about a record's text.

    Args:
        record: The record, before a chat template adds special tokens of its own.
        spelled: Matches special tokens; see `special_pattern`.

    Returns:
        W501, W504, W505, W523 as they apply.
    """
    texts = list(record.texts())
    notes = []
    if spells(record, spelled):
        notes.append("W501")
    if record.prompt == "":
        notes.append("W504")
    if any("\0" in text for text in texts):
        notes.append("W505")
    if record.is_chat and any(map(_HEADERS.search, texts)):
        notes.append("W523")
    return notes


def spells(record: PreferenceRecord, spelled: re.Pattern[str] | None) -> bool:
    """Say whether a record's text spells a special token."""
    return spelled is not None and any(map(spelled.search, record.texts()))


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Match any special token spelled out, the longest first; None where there is none."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special))) if special else None


def are_seen_as_ids(tokenizer: Tokenizer) -> bool:
    """Say whether a special token that is spelled is always its id, and no part of another."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    return not any(
        content in token.content and content != token.content
        for token in added
        for content in special
    )
