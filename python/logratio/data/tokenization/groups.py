"""Token ids of records: rules, truncation and checks, and many groups as flat arrays."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, VALUES, StoreWriter
from logratio.data.records import (
    CHOSEN,
    CODES,
    NO_VALUES,
    PAIR_SIDES,
    REJECTED,
    Completion,
    Cut,
    InvalidRecordError,
    Omitted,
    Refusal,
    Source,
    Values,
)
from logratio.errors import ConfigError
from logratio.synonyms import takes_known_names
from logratio.validation import changes, check_fields


@dataclass(frozen=True, slots=True)
class TokenizedCompletion:
    """A completion's ids.

    Attributes:
        role: ``chosen``, ``rejected``, ``candidate`` or ``demonstration``.
        ids: All tokens after the prompt.
        mask: Weight of each token's log-prob in the sum; 0: it does not count.
        values: Score, rank, margin and weight; None where the data has no such number.
    """

    role: str
    ids: list[int]
    mask: Sequence[float]
    values: Values = NO_VALUES


@dataclass(frozen=True, slots=True)
class TokenizedGroup:
    """A prompt's ids and those of its completions.

    Attributes:
        prompt_ids: The prompt's tokens; at least one.
        completions: The completions, in the record's order.
        source: File and line.
        notes: Codes of warnings (W5xx); W502 and W503 once per affected completion.
    """

    prompt_ids: list[int]
    completions: list[TokenizedCompletion]
    source: Source
    notes: list[str]


def check_different(completions: list[TokenizedCompletion], notes: list[str]) -> None:
    """Refuse a pair whose sides have the same tokens, from which nothing can be learned.

    Raises:
        InvalidRecordError: R303 if one was truncated (W503 in the notes), else R302.
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


@takes_known_names()
@dataclass(frozen=True, slots=True)
class TokenizationRules:
    """How text is tokenized. Every bundle records the rules, so that serving matches training.

    Attributes:
        max_length: Most tokens of a prompt and one completion together.
        max_prompt_length: Most tokens of a prompt. None: ``max_length - 1``.
        prompt_truncation: How to treat a longer prompt: ``drop`` refuses its record (R304),
            ``error`` stops (E304), ``keep_start`` and ``keep_end`` truncate it.
        append_eos: Whether to end completions of plain text with EOS. Set it to False if the
            completions were cut short. Chat templates end answers themselves.
        split_special_tokens: Whether to tokenize a special token in plain text as ordinary text. A
            message that contains one is then refused (R307), because it could not be distinguished
            from the template's special tokens.
        text_as: How to read plain text if the tokenizer has a chat template: ``chat`` wraps a
            prompt as the user's turn and a completion as the assistant's (transcripts turn by
            turn), ``text`` reads it unchanged. None: unchanged, with a warning (W518).
        date: The date in the chat template, as 2026-11-29. None: today, if the template has a clock
            (``strftime_now``); `PreferenceTokenizer.rules` then contains the date. A template with
            ``date_string`` receives only a given date. Without any date in the template, the rules
            contain none.

    Raises:
        ConfigError: A length or policy is invalid.
        SettingTypeError: A field has the wrong type.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    prompt_truncation: PromptTruncation = "drop"
    append_eos: bool = True
    split_special_tokens: bool = False
    text_as: TextAs | None = None
    date: str | None = None

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_length < 2:
            raise ConfigError(f"--max-length is {self.max_length}: a prompt and an answer need 2")
        if not 1 <= self.prompt_budget < self.max_length:
            longest = self.max_length - 1
            raise ConfigError(f"--max-prompt-length is {self.prompt_budget}, not in 1 … {longest}")
        if self.date is not None:
            _check_date(self.date)

    @property
    def prompt_budget(self) -> int:
        """Most tokens of a prompt."""
        return self.max_length - 1 if self.max_prompt_length is None else self.max_prompt_length

    def limited(self, length: int) -> "TokenizationRules":
        """Return these rules with at most `length` tokens of prompt and completion."""
        length, prompt = min(self.max_length, length), self.max_prompt_length
        return replace(
            self,
            max_length=length,
            max_prompt_length=None if prompt is None else min(prompt, length - 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the rules as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TokenizationRules":
        """Restore rules from the result of `to_dict`."""
        return cls(**values)


def _check_date(text: str) -> None:
    try:
        is_iso = date.fromisoformat(text).isoformat() == text
    except ValueError:
        is_iso = False
    if not is_iso:
        raise ConfigError(f"--date is {text!r}: write it as 2026-11-29")


def cut_prompt(ids: list[int], rules: TokenizationRules, bos_id: int | None) -> list[int] | None:
    """Truncate a prompt to its budget.

    Args:
        ids: The whole prompt.
        rules: The budget, and which end to keep.
        bos_id: The token that is kept in front if the prompt begins with it.

    Returns:
        The prompt, truncated if necessary, or None if the rules refuse a long prompt.
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
    """Checks and truncates ids.

    Attributes:
        rules: Lengths and truncation.
        bos_id: The beginning-of-text token, or None.
        vocabulary_size: Exclusive upper bound of the ids.
    """

    def __init__(self, rules: TokenizationRules, bos_id: int | None, vocabulary_size: int) -> None:
        self.rules = rules
        self.bos_id = bos_id
        self.vocabulary_size = vocabulary_size

    def prompt(self, ids: list[int], notes: list[str]) -> list[int]:
        """Check and truncate a prompt; append W506 to `notes` if it was truncated.

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
        self,
        completion: Completion,
        ids: list[int],
        mask: Sequence[float],
        prompt_length: int,
        notes: list[str],
    ) -> TokenizedCompletion:
        """Check and truncate a completion's ids; append W503 to `notes` if they were truncated.

        Raises:
            InvalidRecordError: R301 or R306.
        """
        role = completion.role
        if not any(mask):
            raise InvalidRecordError("R301", f"the {role} completion has no token")
        budget = self.rules.max_length - prompt_length
        if len(ids) > budget:
            notes.append(Cut("W503", len(ids) - budget))
            ids, mask = ids[:budget], mask[:budget]
            if not any(mask):
                reason = f"the history of the {role} answer leaves no room for it within the limit"
                raise InvalidRecordError("R306", reason)
        return TokenizedCompletion(role, ids, mask, completion.values)

    def group(
        self,
        prompt: list[int],
        chosen: list[int],
        rejected: list[int],
        source: Source,
        sides: tuple[Completion, ...] = PAIR_SIDES,
    ) -> TokenizedGroup | Refusal:
        """Build a pair from given token ids, without adding special tokens.

        Args:
            prompt: The prompt.
            chosen: The better completion.
            rejected: The worse one.
            source: File and line.
            sides: Roles and values of both completions.

        Returns:
            The group, or its refusal: E402, E601, R301 to R305.
        """
        notes: list[str] = []
        try:
            for ids in (prompt, chosen, rejected):
                self._check(ids)
            prompt_ids = self.prompt(prompt, notes)
            completions = [
                self.completion(side, ids, [1] * len(ids), len(prompt_ids), notes)
                for side, ids in zip(sides, (chosen, rejected), strict=True)
            ]
            check_different(completions, notes)
        except InvalidRecordError as error:
            return Refusal(source, error.code, error.reason)
        return TokenizedGroup(prompt_ids, completions, source, notes)

    def _check(self, ids: list[int]) -> None:
        """Refuse ids outside the embedding: on a GPU they would abort the process."""
        size = self.vocabulary_size
        wrong = next((value for value in ids if not 0 <= value < size), None)
        if wrong is not None:
            raise InvalidRecordError("E601", f"the token id {wrong} is not in 0 … {size - 1}")


KEPT, DUPLICATE, CONFLICT = range(3)
"""Outcome of a group: written; a duplicate, not written; written although its opposite was too."""

PAIR = np.array([ROLES.index(CHOSEN), ROLES.index(REJECTED)], np.uint8)
"""The roles of a pair."""


@dataclass(frozen=True, slots=True)
class GroupArrays:
    """`G` groups with `N` completions as flat arrays.

    Attributes:
        prompt_ids: int32, all prompts concatenated.
        prompt_lengths: uint32 `[G]`, tokens of each prompt.
        completion_ids: int32, all completions concatenated, group by group.
        completion_mask: uint8, for each token of `completion_ids` 0 if it does not count, 1 if it
            counts once, or the number of its weight (see `TurnWeights`).
        completion_lengths: uint32 `[N]`, tokens of each completion.
        group_sizes: uint32 `[G]`, completions of each group.
        roles: uint8 `[N]`, index into `logratio._rust.ROLES`.
        files: uint32 `[G]`, number of the source file.
        lines: uint64 `[G]`, line in that file.
        values: float32 `[N, 4]`, the values of each completion in the order of
            `logratio._rust.VALUES`; NaN where it has none.
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
    values: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        groups: Sequence[TokenizedGroup],
        file_number: Callable[[Source], int],
        numbered: "Callable[[NDArray[np.float64]], NDArray[np.uint8]]",
    ) -> "GroupArrays":
        """Concatenate groups.

        Args:
            groups: The groups.
            file_number: Returns the number of a source's file.
            numbered: Returns the mask for the weights of tokens: `TurnWeights.numbered`.
        """
        completions = [completion for group in groups for completion in group.completions]
        return cls(
            _flat((group.prompt_ids for group in groups), np.int32),
            _array((len(group.prompt_ids) for group in groups), np.uint32),
            _flat((completion.ids for completion in completions), np.int32),
            numbered(_flat((completion.mask for completion in completions), np.float64)),
            _array((len(completion.ids) for completion in completions), np.uint32),
            _array((len(group.completions) for group in groups), np.uint32),
            _array((_ROLE[completion.role] for completion in completions), np.uint8),
            _array((file_number(group.source) for group in groups), np.uint32),
            _array((group.source.line for group in groups), np.uint64),
            np.array([one.values for one in completions], np.float32).reshape(-1, len(VALUES)),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def push(self, writer: StoreWriter) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Write the groups.

        Returns:
            The outcome of each group, uint8 `[G]`, and the earlier group that it repeats or
            contradicts, int64 `[G]`, -1 for none.
        """
        return writer.push_many(*(getattr(self, field.name) for field in fields(self)))


_ROLE = {name: number for number, name in enumerate(ROLES)}


def no_values(completions: int) -> NDArray[np.float32]:
    """Return the values of completions that have none: float32 `[N, 4]`."""
    return np.full((completions, len(VALUES)), np.nan, np.float32)


def _array(values: Iterable[int], dtype: Any) -> NDArray[Any]:
    return np.fromiter(values, dtype)


def _flat(parts: Iterable[Sequence[float]], dtype: Any) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(parts), dtype)
