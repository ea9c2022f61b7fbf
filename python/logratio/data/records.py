"""What a row of a data file means, as text: a prompt and its completions, or why it is refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from logratio.data.codes import stops
from logratio.errors import LogratioError

Message = Mapping[str, Any]
"""One turn of a chat: ``{"role": …, "content": …}``, and what else its template reads."""

Text = str | tuple[Message, ...]
"""Plain text, or turns of a chat that a template renders."""

CHOSEN, REJECTED, CANDIDATE, DEMONSTRATION = "chosen", "rejected", "candidate", "demonstration"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record came from: the file as it was named, and the line, from 1 (0: the file)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt.

    Attributes:
        role: ``chosen``, ``rejected``, ``candidate`` or ``demonstration``.
        answer: What counts; of turns, only the assistant's.
        context: What stands between the prompt and the answer and does not count: the history
            that this completion does not share with its sibling. Of the answer's kind.

    Of turns, an assistant's with ``"weight": 0`` does not count. A string behind a prompt of turns
    is what the assistant's next turn begins with, as it stands; that turn does not end.
    """

    role: str
    answer: Text
    context: Text = ""


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt and its completions as text.

    Attributes:
        prompt: What every completion answers.
        completions: Chosen stands before rejected; of a ranked list, the best is first.
        source: Where the record came from.
        tools: Descriptions of functions that a chat template may write out.
        ends: Whether the completions come to their end; a single step of a solution does not, and
            no end-of-text token may follow it.
        scores: Of a ranked list, a number for each completion; larger is better.
    """

    prompt: Text
    completions: tuple[Completion, ...]
    source: Source
    tools: tuple[Message, ...] = ()
    ends: bool = True
    scores: tuple[float, ...] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether a chat template has to render this record."""
        return not isinstance(self.prompt, str)

    def texts(self) -> Iterator[str]:
        """Yield every text that a person or a model wrote."""
        parts = [self.prompt]
        for completion in self.completions:
            parts += [completion.context, completion.answer]
        for part in parts:
            if isinstance(part, str):
                yield part
            else:
                yield from (str(turn.get("content") or "") for turn in part)

    def digest(self, *, swapped: bool = False) -> bytes:
        """Hash the content (16 bytes); ``swapped`` as if the completions' roles were exchanged."""
        roles = [completion.role for completion in self.completions]
        if swapped:
            roles.reverse()
        parts = sorted(
            (role, repr(completion.context), repr(completion.answer))
            for role, completion in zip(roles, self.completions, strict=True)
        )
        text = repr((self.prompt, self.tools, parts))
        return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that was not taken, and why.

    Attributes:
        source: File and line.
        code: One of `logratio.data.codes.CODES`.
        reason: A sentence for the person who has to repair the row.
        column: Where in the line, in characters from 1, if known.
    """

    source: Source
    code: str
    reason: str
    column: int | None = None

    @property
    def stops(self) -> bool:
        """Whether the row's structure is broken, which stops the run unless it may go on."""
        return stops(self.code)

    def __str__(self) -> str:
        column = "" if self.column is None else f":{self.column}"
        return f"{self.source}{column} [{self.code}] {self.reason}"


class InvalidRecordError(LogratioError, ValueError):
    """A row, or a prompt and completion, cannot be taken.

    Attributes:
        code: One of `logratio.data.codes.CODES`.
        reason: A sentence for the person who has to repair it.
        format: The name of the row's format, where that was known before the fault was found.
    """

    def __init__(self, code: str, reason: str, format: str | None = None) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.format = format

    def __str__(self) -> str:
        return f"[{self.code}] {self.reason}"
