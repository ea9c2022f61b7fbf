"""Names of settings in messages: flags on the command line, fields in Python.

Messages are written with flags (`--eval-share`), because a flag cannot be taken for another word.
`LogratioError` and `progress.say` show them as fields (`eval_share`), except in the command line.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_RULES = (
    *("max-length", "max-prompt-length", "prompt-truncation", "split-special-tokens", "date"),
)
_FORMATS = (
    *("format", "columns", "label", "lists", "strings", "split", "score", "encoding", "rows"),
    "group-by",
)
_LORA = ("rank", "alpha", "dropout", "modules-to-save", "init")
FIELDS: Mapping[str, str] = {
    "compile": "compile_layers",
    "loss-option": "loss_options",
    **{flag: "rules." + flag.replace("-", "_") for flag in _RULES},
    "eos": "rules.append_eos",
    "no-eos": "rules.append_eos=False",
    "chat": 'rules.text_as="chat"',
    "text": 'rules.text_as="text"',
    **{flag: "formats." + flag.replace("-", "_") for flag in _FORMATS},
    **{f"lora-{flag}": "lora." + flag.replace("-", "_") for flag in _LORA},
    "lora": "lora=LoraSettings()",
    "lora-target": "lora.targets",
    "lora-rslora": "lora.use_rslora",
    "lora-dora": "lora.use_dora",
    "lora-config": "read_lora_config",
    "no-report": "report=False",
}
"""Flags without their dashes, and their fields if these have another name or are nested."""
BLOCKS: Mapping[str, str] = {
    "LoraSettings": "lora",
    "TokenizationRules": "rules",
    "FormatSettings": "formats",
}
"""Classes of nested settings, and the fields that hold them."""
_SWITCHES = {"resume", "overwrite", "precompute", "deterministic", "dry-run"}
_COMMAND = r"`[a-z][^`]*`"
_FLAG = r"(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)"


class _Voice:
    """How this process names settings."""

    flags = False


@contextmanager
def flags_in_messages() -> Iterator[None]:
    """Show flags in messages, as the command line does, instead of fields."""
    before, _Voice.flags = _Voice.flags, True
    try:
        yield
    finally:
        _Voice.flags = before


def worded(text: str) -> str:
    """Return a message with the names that the user of this process gives to settings."""
    return text if _Voice.flags else with_fields(text)


def with_fields(text: str) -> str:
    """Replace flags in a message by fields; commands in backticks stay as they are.

    Example:
        >>> with_fields("--eval-share is 0: give it, or run `logratio data build --json out`")
        'eval_share is 0: give it, or run `logratio data build --json out`'
    """
    if "--" not in text:
        return text
    return re.sub(f"{_COMMAND}|{_FLAG}", lambda found: _field(found[1]) or found[0], text)


def _field(flag: str | None) -> str | None:
    if flag in _SWITCHES:
        return f"{flag.replace('-', '_')}=True"
    return flag and FIELDS.get(flag, flag.replace("-", "_"))


def flag_of(kind: str, field: str) -> str:
    """Return how a message is written that names a field: as its flag, if there may be one.

    Args:
        kind: The class with the field.
        field: The name of the field.

    Example:
        >>> flag_of("LoraSettings", "targets"), flag_of("FeedSettings", "layout")
        ('--lora-target', 'layout')
    """
    if kind not in BLOCKS and not kind.endswith("Config"):
        return field
    path = f"{BLOCKS[kind]}.{field}" if kind in BLOCKS else field
    flags = {place: flag for flag, place in FIELDS.items()}
    return "--" + flags.get(path, field.replace("_", "-"))
