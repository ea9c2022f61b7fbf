"""What is cut when a text is too long: stated once, looked at one sequence at a time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

from logratio.errors import ConfigError
from logratio.validation import check_fields

PromptTruncation = Literal["drop", "error", "keep_start", "keep_end"]
TextAs = Literal["text", "chat"]


@dataclass(frozen=True, slots=True)
class TokenizationRules:
    """How text becomes ids; part of every bundle, so that serving does as training did.

    Attributes:
        max_length: Most tokens of a prompt and one completion together.
        max_prompt_length: Most tokens of a prompt; None: ``max_length - 1``.
        prompt_truncation: What becomes of a longer prompt: ``drop`` refuses its record (R304),
            ``error`` stops (E304), ``keep_start`` and ``keep_end`` cut it.
        append_eos: End completions of plain text with the end-of-text token. Set it to False
            where completions are cut off. Chats end as their template says.
        split_special_tokens: Read a special token that is spelled in a text of strings as plain
            text. A message that spells one is then refused (R307): a template's own special
            tokens could not be told from it.
        text_as: What plain text is to a tokenizer that has a chat template: ``chat`` wraps a prompt
            as the user's turn and a completion as the assistant's (transcripts turn by turn), and
            ``text`` reads them as they stand. None: as they stand, with a warning (W518).
        date: The date that the chat template writes, as 2026-11-29. None: today's, if the template
            has a clock (``strftime_now``); `PreferenceTokenizer.rules` holds the one in use, so
            that it is recorded. A template that reads ``date_string`` gets it only where it is
            given, and the rules of a template without any date hold none.

    Raises:
        ConfigError: A length or policy is not possible.
        SettingTypeError: A field has the wrong type.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    prompt_truncation: PromptTruncation = "drop"
    append_eos: bool = True
    split_special_tokens: bool = False
    text_as: TextAs | None = None
    date: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}: a prompt and an answer need 2")
        if not 1 <= self.prompt_budget < self.max_length:
            longest = self.max_length - 1
            raise ConfigError(f"max_prompt_length is {self.prompt_budget}, not in 1 … {longest}")
        if self.date is not None:
            _check_date(self.date)

    @property
    def prompt_budget(self) -> int:
        """Most tokens that a prompt may have."""
        return self.max_length - 1 if self.max_prompt_length is None else self.max_prompt_length

    def to_dict(self) -> dict[str, Any]:
        """Return the rules as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TokenizationRules":
        """Read what `to_dict` returned."""
        return cls(**values)


def _check_date(text: str) -> None:
    try:
        is_iso = date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_iso = False
    if not is_iso:
        raise ConfigError(f"date is {text!r}: write it as 2026-11-29")


def cut_prompt(ids: list[int], rules: TokenizationRules, bos_id: int | None) -> list[int] | None:
    """Fit a prompt into its budget.

    Args:
        ids: The whole prompt.
        rules: Its budget and what to keep.
        bos_id: The token that stays in front if the prompt begins with it.

    Returns:
        The prompt, cut where needed; None where the rules keep no part of it.
    """
    budget = rules.prompt_budget
    if len(ids) <= budget:
        return ids
    if rules.prompt_truncation == "keep_start":
        return ids[:budget]
    if rules.prompt_truncation == "keep_end":
        front = ids[:1] if ids[0] == bos_id else []
        tail = budget - len(front)
        return front + ids[len(ids) - tail :]
    return None
