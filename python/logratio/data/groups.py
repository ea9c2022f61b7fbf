"""A record as token ids."""

from dataclasses import dataclass

from logratio.data.codes import Omitted
from logratio.data.records import CHOSEN, REJECTED, InvalidRecordError, Source


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
