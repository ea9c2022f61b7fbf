"""Prompts and candidates as token ids."""

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
from logratio.data.tokenization.tokenizer_files import TokenizerFiles, read_tokenizer

Prompt = str | Sequence[Message]
"""Plain text, or chat messages, which are formatted with the bundle's chat template."""

_UNCUT = 2**31 - 1
_HERE = Source("this prompt", 0)


@dataclass(frozen=True, slots=True)
class Reading:
    """How prompts and candidates are tokenized.

    Attributes:
        truncate: Truncate and mark candidates that are too long, instead of setting an error. None:
            as chosen at load.
        most_tokens: Truncate candidates to this number of tokens. None: no such limit.
        verbatim: Read text as decoded token ids, in which special tokens are spelled: do not format
            it with the chat template, and do not append EOS.
    """

    truncate: bool | None = None
    most_tokens: int | None = None
    verbatim: bool = False


READING = Reading()
"""As the bundle was loaded."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tokenized candidate.

    Attributes:
        ids: Token ids, at least one; empty if there is an error.
        truncated: Whether the end was truncated.
        error: Why the candidate cannot be scored; None if it can.
        reference_logps: The reference's log-prob sum in nats, if the graph takes it as an input.
    """

    ids: tuple[int, ...]
    truncated: bool = False
    error: str | None = None
    reference_logps: float | None = None


@dataclass(frozen=True, slots=True)
class CandidateGroup:
    """A tokenized prompt and its candidates.

    Attributes:
        prompt_ids: Token ids of the prompt, at least one.
        prompt_truncated: Whether the bundle's rules truncated the prompt.
        candidates: The candidates in the caller's order.
    """

    prompt_ids: tuple[int, ...]
    prompt_truncated: bool
    candidates: tuple[Candidate, ...]

    def different(self) -> dict[tuple[int, ...], list[int]]:
        """Map each distinct sequence of ids to its indexes; each sequence is scored once."""
        places: dict[tuple[int, ...], list[int]] = {}
        for index, candidate in enumerate(self.candidates):
            if candidate.error is None:
                places.setdefault(candidate.ids, []).append(index)
        return places

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """The ids of the prompt, then of each candidate."""
        return (self.prompt_ids, *(candidate.ids for candidate in self.candidates))

    def known_logps(self) -> dict[tuple[int, ...], float]:
        """Map each distinct sequence of ids to the reference's log-probs that are given for it."""
        return {
            candidate.ids: candidate.reference_logps
            for candidate in self.candidates
            if candidate.error is None and candidate.reference_logps is not None
        }


class CandidateEncoder:
    """Tokenize as in training, except that completions are truncated only on request."""

    def __init__(self, folder: Path, rules: TokenizationRules, truncate: bool) -> None:
        """Load the tokenizer of a bundle.

        Args:
            folder: The bundle.
            rules: The bundle's tokenization rules.
            truncate: Truncate completions that are too long instead of setting an error.
        """
        self._set(read_tokenizer(folder, as_written=True), rules, truncate)

    def _set(self, files: TokenizerFiles, rules: TokenizationRules, truncate: bool) -> None:
        self._rules, self._truncate = rules, truncate
        uncut = replace(rules, max_length=_UNCUT, max_prompt_length=rules.prompt_budget)
        self.tokenizer = PreferenceTokenizer(files, uncut)

    def shortened(self, max_length: int) -> "CandidateEncoder":
        """Return an encoder of the same tokenizer that truncates to a smaller length in tokens."""
        other = CandidateEncoder.__new__(CandidateEncoder)
        other._set(self.tokenizer.files, self._rules.limited(max_length), True)
        return other

    def verbatim(self) -> "CandidateEncoder":
        """Return an encoder that reads text as decoded ids: no template, and no EOS is appended.

        The names of special tokens in the text become these tokens.
        """
        other = CandidateEncoder.__new__(CandidateEncoder)
        rules = replace(self._rules, text_as="text", append_eos=False, split_special_tokens=False)
        other._set(self.tokenizer.files, rules, self._truncate)
        return other

    @property
    def truncates(self) -> bool:
        """Whether completions that are too long are truncated, instead of getting an error."""
        return self._truncate

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and one candidate together."""
        return self._rules.max_length

    def without_opening(self, text: str) -> str:
        """Remove the text of the tokens that `encode` prepends, such as BOS, from decoded ids."""
        return text.removeprefix(self.tokenizer.decode(self.tokenizer.files.opening_ids))

    def encode(
        self, prompt: Prompt, candidates: Sequence[str], reading: Reading = READING
    ) -> CandidateGroup:
        """Tokenize a prompt and its candidates.

        A candidate that cannot be scored gets an `error`; the others are not affected.

        Args:
            prompt: Text or chat messages.
            candidates: The completions.
            reading: How completions that are too long are treated.

        Raises:
            InvalidRecordError: The prompt is invalid; `code` gives the reason.
        """
        text = _checked(prompt)
        opening = self.tokenizer.encode_record(PreferenceRecord(text, (), _HERE))
        if isinstance(opening, Refusal):
            raise InvalidRecordError(opening.code, opening.reason)
        group, errors = self._encode(text, candidates)
        # A chat template may render the prompt differently before a completion.
        prompt_ids = group.prompt_ids if group else opening.prompt_ids
        room = self._rules.max_length - len(prompt_ids)
        cut = self._truncate if reading.truncate is None else reading.truncate
        if reading.most_tokens is not None:
            room, cut = min(room, reading.most_tokens), True
        ids = iter([completion.ids for completion in group.completions] if group else [])
        return CandidateGroup(
            tuple(prompt_ids),
            "W506" in (group or opening).notes,
            tuple(
                Candidate((), error=errors[index])
                if index in errors
                else self._fit(next(ids), room, cut)
                for index in range(len(candidates))
            ),
        )

    def _encode(
        self, text: Text, candidates: Sequence[str]
    ) -> tuple[TokenizedGroup | None, dict[int, str]]:
        """Tokenize all valid candidates together, so that they share one prompt.

        Returns:
            The group of the valid candidates (None if there are none), and the errors of the
            others by index.
        """
        faults = {index: _fault(candidate) for index, candidate in enumerate(candidates)}
        errors = {index: fault for index, fault in faults.items() if fault}
        while sound := [i for i in range(len(candidates)) if i not in errors]:
            try:
                taken = [candidates[index] for index in sound]
                return self.tokenizer.encode_completions(text, taken), errors
            except InvalidRecordError as error:
                alone = {index: self._error(text, candidates[index]) for index in sound}
                found = {index: reason for index, reason in alone.items() if reason}
                errors |= found or dict.fromkeys(sound, str(error))
        return None, errors

    def _error(self, text: Text, candidate: str) -> str | None:
        """Return why a candidate cannot be tokenized, or None."""
        try:
            self.tokenizer.encode_completion(text, candidate)
        except InvalidRecordError as error:
            return str(error)
        return None

    def _fit(self, ids: list[int], room: int, truncate: bool) -> Candidate:
        if len(ids) <= room:
            return Candidate(tuple(ids))
        if truncate:
            return Candidate(tuple(ids[:room]), truncated=True)
        return Candidate(
            (),
            error=f"{len(ids):,} tokens; the prompt leaves {room:,} of {self._rules.max_length:,}",
        )


def _checked(prompt: Prompt) -> Text:
    text = prompt if isinstance(prompt, str) else check_turns(prompt, "prompt")
    parts = [text] if isinstance(text, str) else [str(turn.get("content")) for turn in text]
    if not all(map(_is_sound, parts)):
        raise InvalidRecordError("E104", "the prompt contains a lone surrogate")
    return text


def _is_sound(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8, so has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault(candidate: str) -> str | None:
    """Return the error of a candidate that can be rejected without tokenization, or None."""
    if not _is_sound(candidate):
        return "[E104] the candidate contains a lone surrogate"
    return None if candidate.strip() else "[R301] a completion is empty"
