"""Prompts and candidates as ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from logratio.data.conversations import prompt as check_turns
from logratio.data.records import (
    InvalidRecordError,
    Message,
    PreferenceRecord,
    Refusal,
    Source,
    Text,
)
from logratio.data.tokenization.groups import TokenizationRules, TokenizedGroup
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.data.tokenization.tokenizer_files import read_tokenizer

Prompt = str | Sequence[Message]
"""Plain text, or the turns of a chat, which the bundle's chat template renders."""

_UNCUT = 2**31 - 1
_HERE = Source("this prompt", 0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate as ids.

    Attributes:
        ids: At least one token; empty where there is an error.
        truncated: Whether its end was cut.
        error: Why it cannot be scored; None: it can.
    """

    ids: tuple[int, ...]
    truncated: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CandidateGroup:
    """A prompt and candidates of it, ready for the graph.

    Attributes:
        prompt_ids: At least one token.
        prompt_truncated: Whether the bundle's rules cut the prompt.
        candidates: In the caller's order.
    """

    prompt_ids: tuple[int, ...]
    prompt_truncated: bool
    candidates: tuple[Candidate, ...]

    def different(self) -> dict[tuple[int, ...], list[int]]:
        """Return where each different sequence of ids stands; each is scored once."""
        places: dict[tuple[int, ...], list[int]] = {}
        for index, candidate in enumerate(self.candidates):
            if candidate.error is None:
                places.setdefault(candidate.ids, []).append(index)
        return places


class CandidateEncoder:
    """Turns text into ids as training did, except that no completion is cut unless asked for."""

    def __init__(self, folder: Path, rules: TokenizationRules, truncate: bool) -> None:
        """Load the tokenizer of a bundle.

        Args:
            folder: The bundle.
            rules: Its rules.
            truncate: Cut completions that are too long, instead of an error for each.
        """
        self._max_length = rules.max_length
        self._truncate = truncate
        uncut = replace(rules, max_length=_UNCUT, max_prompt_length=rules.prompt_budget)
        self.tokenizer = PreferenceTokenizer(read_tokenizer(folder, as_written=True), uncut)

    def encode(self, prompt: Prompt, candidates: Sequence[str]) -> CandidateGroup:
        """Encode a prompt and candidates of it.

        A candidate that cannot be scored carries its reason; the others are not affected.

        Raises:
            InvalidRecordError: The prompt cannot be taken; its `code` says why.
        """
        text = _checked(prompt)
        opening = self.tokenizer.encode_record(PreferenceRecord(text, (), _HERE))
        if isinstance(opening, Refusal):
            raise InvalidRecordError(opening.code, opening.reason)
        group, errors = self._encode(text, candidates)
        # A chat template may ask with more than it writes before these answers.
        prompt_ids = group.prompt_ids if group else opening.prompt_ids
        room = self._max_length - len(prompt_ids)
        ids = iter([completion.ids for completion in group.completions] if group else [])
        return CandidateGroup(
            tuple(prompt_ids),
            "W506" in (group or opening).notes,
            tuple(
                Candidate((), error=errors[index])
                if index in errors
                else self._fit(next(ids), room)
                for index in range(len(candidates))
            ),
        )

    def _encode(
        self, text: Text, candidates: Sequence[str]
    ) -> tuple[TokenizedGroup | None, dict[int, str]]:
        """Encode together all candidates that can be taken: they share one prompt.

        Returns:
            Their group, None if there is none, and the error of each other candidate by its index.
        """
        faults = {index: _fault(candidate) for index, candidate in enumerate(candidates)}
        errors = {index: fault for index, fault in faults.items() if fault}
        while sound := [i for i in range(len(candidates)) if i not in errors]:
            try:
                taken = [candidates[index] for index in sound]
                return self.tokenizer.encode_completions(text, taken), errors
            except InvalidRecordError as error:
                alone = {index: self._error(text, candidates[index]) for index in sound}
                found = {index: own for index, own in alone.items() if own}
                errors |= found or dict.fromkeys(sound, str(error))
        return None, errors

    def _error(self, text: Text, candidate: str) -> str | None:
        """Say why a candidate cannot be taken, if it cannot."""
        try:
            self.tokenizer.encode_completion(text, candidate)
        except InvalidRecordError as error:
            return str(error)
        return None

    def _fit(self, ids: list[int], room: int) -> Candidate:
        if len(ids) <= room:
            return Candidate(tuple(ids))
        if self._truncate:
            return Candidate(tuple(ids[:room]), truncated=True)
        return Candidate(
            (), error=f"{len(ids):,} tokens, and {room:,} are left of {self._max_length:,}"
        )


def _checked(prompt: Prompt) -> Text:
    text = prompt if isinstance(prompt, str) else check_turns(prompt, "prompt")
    parts = [text] if isinstance(text, str) else [str(turn.get("content")) for turn in text]
    if not all(map(_is_sound, parts)):
        raise InvalidRecordError("E104", "the prompt holds half a character (a lone surrogate)")
    return text


def _is_sound(text: str) -> bool:
    """Tell text from Python strings that no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault(candidate: str) -> str | None:
    """Say what is wrong with a candidate that no tokenizer need look at."""
    if not _is_sound(candidate):
        return "[E104] half a character (a lone surrogate)"
    return None if candidate.strip() else "[R301] a completion is empty"
