"""A record as token ids that the rules allow: checked, truncated; many groups as flat arrays."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, StoreWriter
from logratio.data.records import (
    CHOSEN,
    CODES,
    REJECTED,
    Cut,
    InvalidRecordError,
    Omitted,
    Refusal,
    Source,
)
from logratio.errors import ConfigError
from logratio.validation import check_fields


@dataclass(frozen=True, slots=True)
class TokenizedCompletion:
    """A completion's ids.

    Attributes:
        role: What it is to its prompt.
        ids: Every token behind the prompt.
        mask: For each token, 1 where its log-prob counts, else 0.
    """

    role: str
    ids: list[int]
    mask: list[int]


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """A prompt's ids and those of its completions.

    Attributes:
        prompt_ids: At least one token.
        completions: In the record's order.
        source: File and line.
        notes: Codes of warnings (W5xx); W502 and W503 once for each completion concerned.
    """

    prompt_ids: list[int]
    completions: list[TokenizedCompletion]
    source: Source
    notes: list[str]


def check_different(completions: list[TokenizedCompletion], notes: list[str]) -> None:
    """Refuse a pair whose two sides became the same tokens: nothing can be learnt from it.

    Raises:
        InvalidRecordError: R303 where one was cut (W503 among the notes), else R302.
    """
    if [completion.role for completion in completions] != [CHOSEN, REJECTED]:
        return
    chosen, rejected = completions
    if (chosen.ids, chosen.mask) == (rejected.ids, rejected.mask):
        code, when = ("R303", "once truncated") if "W503" in notes else ("R302", "as tokens")
        left_out = next((note.what for note in notes if isinstance(note, Omitted)), None)
        why = f": the chat template leaves out {left_out}" if left_out else ""
        raise InvalidRecordError(code, f"chosen and rejected are identical {when}{why}")


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


class Fitting:
    """Checks and cuts ids, wherever they come from.

    Attributes:
        rules: Lengths, and what to cut.
        bos_id: The beginning-of-text token, if there is one.
        vocabulary_size: Ids are below it.
    """

    def __init__(self, rules: TokenizationRules, bos_id: int | None, vocabulary_size: int) -> None:
        self.rules = rules
        self.bos_id = bos_id
        self.vocabulary_size = vocabulary_size

    def prompt(self, ids: list[int], notes: list[str]) -> list[int]:
        """Return a prompt's ids as the rules allow them; W506 in `notes` where they were cut.

        Raises:
            InvalidRecordError: R305, E402, R304 or E304.
        """
        if not ids:
            raise InvalidRecordError("R305", CODES["R305"])
        if len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            raise InvalidRecordError("E402", "the text begins with two beginning-of-text tokens")
        fitted = cut_prompt(ids, self.rules, self.bos_id)
        if fitted is None:
            code = "E304" if self.rules.prompt_truncation == "error" else "R304"
            reason = f"the prompt has {len(ids)} tokens, the limit is {self.rules.prompt_budget}"
            raise InvalidRecordError(code, reason)
        if len(fitted) < len(ids):
            notes.append(Cut("W506", len(ids) - len(fitted)))
        return fitted

    def completion(
        self, role: str, ids: list[int], mask: list[int], prompt_length: int, notes: list[str]
    ) -> TokenizedCompletion:
        """Return a completion as the rules allow it; W503 in `notes` where it was cut.

        Raises:
            InvalidRecordError: R301 or R306.
        """
        if not any(mask):
            raise InvalidRecordError("R301", f"the {role} completion has no token")
        budget = self.rules.max_length - prompt_length
        if len(ids) > budget:
            notes.append(Cut("W503", len(ids) - budget))
            ids, mask = ids[:budget], mask[:budget]
            if not any(mask):
                raise InvalidRecordError("R306", f"the history of {role} leaves it no room")
        return TokenizedCompletion(role, ids, mask)

    def group(
        self, prompt: list[int], chosen: list[int], rejected: list[int], source: Source
    ) -> TokenizedGroup | Refusal:
        """Make a pair of ids from elsewhere; nothing is added to them.

        Returns:
            The group, or why it is refused: E402, E601, R301 to R305.
        """
        notes: list[str] = []
        try:
            for ids in (prompt, chosen, rejected):
                self._check(ids)
            prompt_ids = self.prompt(prompt, notes)
            completions = [
                self.completion(role, ids, [1] * len(ids), len(prompt_ids), notes)
                for role, ids in ((CHOSEN, chosen), (REJECTED, rejected))
            ]
            check_different(completions, notes)
        except InvalidRecordError as error:
            return Refusal(source, error.code, error.reason)
        return TokenizedGroup(prompt_ids, completions, source, notes)

    def _check(self, ids: list[int]) -> None:
        """Refuse ids that no row of an embedding answers to: on a GPU they end the process."""
        size = self.vocabulary_size
        wrong = next((value for value in ids if not 0 <= value < size), None)
        if wrong is not None:
            raise InvalidRecordError("E601", f"the token id {wrong} is not in 0 … {size - 1}")


KEPT, DUPLICATE, CONFLICT = range(3)
"""What became of a group: written; said before, so not written; written though the opposite was."""

PAIR = np.array([ROLES.index(CHOSEN), ROLES.index(REJECTED)], np.uint8)
"""The roles of a pair."""


@dataclass(frozen=True, slots=True)
class GroupArrays:
    """`G` groups of `N` completions, ids end to end.

    Attributes:
        prompt_ids: int32, every prompt.
        prompt_lengths: uint32 `[G]`.
        completion_ids: int32, every completion, group after group.
        completion_mask: uint8, 1 where a completion's token counts.
        completion_lengths: uint32 `[N]`.
        group_sizes: uint32 `[G]`, completions of each group.
        roles: uint8 `[N]`, index into `logratio._rust.ROLES`.
        files: uint32 `[G]`, number of the source file.
        lines: uint64 `[G]`, line in it.
    """

    prompt_ids: NDArray[np.int32]
    prompt_lengths: NDArray[np.uint32]
    completion_ids: NDArray[np.int32]
    completion_mask: NDArray[np.uint8]
    completion_lengths: NDArray[np.uint32]
    group_sizes: NDArray[np.uint32]
    roles: NDArray[np.uint8]
    files: NDArray[np.uint32]
    lines: NDArray[np.uint64]

    @classmethod
    def of(
        cls, groups: Sequence[TokenizedGroup], file_number: Callable[[Source], int]
    ) -> "GroupArrays":
        """Lay groups end to end; `file_number` numbers their sources' files."""
        completions = [completion for group in groups for completion in group.completions]
        return cls(
            _flat((group.prompt_ids for group in groups), np.int32),
            _array((len(group.prompt_ids) for group in groups), np.uint32),
            _flat((completion.ids for completion in completions), np.int32),
            _flat((completion.mask for completion in completions), np.uint8),
            _array((len(completion.ids) for completion in completions), np.uint32),
            _array((len(group.completions) for group in groups), np.uint32),
            _array((_ROLE[completion.role] for completion in completions), np.uint8),
            _array((file_number(group.source) for group in groups), np.uint32),
            _array((group.source.line for group in groups), np.uint64),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def push(self, writer: StoreWriter) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Write the groups.

        Returns:
            What became of each, uint8 `[G]`, and the group that said it or its opposite before,
            int64 `[G]`, -1 where none did.
        """
        return writer.push_many(*(getattr(self, field.name) for field in fields(self)))


_ROLE = {name: number for number, name in enumerate(ROLES)}


def _array(values: Iterable[int], dtype: Any) -> NDArray[Any]:
    return np.fromiter(values, dtype)


def _flat(parts: Iterable[Sequence[int]], dtype: Any) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(parts), dtype)
