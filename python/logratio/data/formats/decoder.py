"""Rows to records, one row at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from logratio.data.containers import Row
from logratio.data.formats.cells import FLAGS
from logratio.data.formats.choices import records_of
from logratio.data.formats.families import SAID, read_row
from logratio.data.formats.meaning import Meaning
from logratio.data.formats.questions import check_unread
from logratio.data.formats.settings import FormatSettings, Kind
from logratio.data.formats.view import View
from logratio.data.records import InvalidRecordError, PreferenceRecord, Source

_CALLED: Mapping[Kind, str] = {
    "pair": "a preference pair",
    "unpaired": "unpaired feedback",
    "group": "a ranked list",
    "demonstration": "a demonstration",
}
_TEXTS = {"prompt", "chosen", "rejected"}
_NOTHING = (None, None)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A row as records.

    Attributes:
        records: What it says; one, but for a ranked list that became pairs. At least one.
        format: The name of its format.
        extra_keys: Keys that were not read.
        left_out: For each pair of a list that was not made, or completion that was not taken, the
            code of the reason: R310 for a tie, R301, R302.
        warnings: Codes of what is kept and counted of the row.
    """

    records: tuple[PreferenceRecord, ...]
    format: str
    extra_keys: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """Whether a chat template writes the records."""
        return any(record.is_chat for record in self.records)


class Decoder:
    """Reads rows of any known format, each as what it is.

    It remembers what the first row of each file was: one file says one kind of thing (pairs,
    unpaired feedback, lists) and its prompts are of one kind, while its rows may have different
    formats.

    Attributes:
        settings: What was said about the data.
    """

    def __init__(self, settings: FormatSettings | None = None) -> None:
        self.settings = settings or FormatSettings()
        self._first: dict[str, tuple[Kind, Source]] = {}
        self._plain: dict[str, tuple[bool, Source]] = {}
        self._spelled: dict[str, tuple[bool, Source]] = {}
        kinds, lists = self.settings.kinds, self.settings.lists
        told = replace(
            self.settings,
            kinds=None,
            strings=None,
            split=None,
            encoding=None,
            rows=None,
            group_by=None,
        )
        self._is_untold = told == FormatSettings(lists=lists) and (not kinds or "pair" in kinds)

    def decode(self, row: Row, source: Source) -> Decoded:
        """Read a row.

        Args:
            row: The JSON object of one line.
            source: Its file and line.

        Raises:
            InvalidRecordError: E2xx where the format is unknown or broken, E403 where roles do not
                fit, R301, R302 and R310 where the content is of no use.
        """
        settings = self.settings
        view = View(row, settings.columns, settings.strings)
        meaning = read_row(view, settings)
        check_unread(view)
        self._check_kind(meaning, source)
        if view.is_plain is not None:
            self._check_plain(view.is_plain, source)
        spelled = ("W522",) if self._is_spelled(view, source) else ()
        warnings = (*spelled, *meaning.warnings)
        try:
            records, left_out = records_of(meaning, source, settings)
        except InvalidRecordError as error:
            error.format = meaning.format
            raise
        extra = view.extra_keys()
        return Decoded(tuple(records), meaning.format, extra, tuple(left_out), warnings)

    def holds_pairs_of_text(self, file: str, names: Iterable[str]) -> bool:
        """Say what rows of a file can only be, if their prompt, chosen and rejected are strings.

        Args:
            file: The name of their container.
            names: All their keys.

        Returns:
            Whether these are a pair of plain text and nothing else is read of them. Only known
            once a row of the file was decoded.
        """
        return (
            self._is_untold
            and self._first.get(file, _NOTHING)[0] == "pair"
            and self._plain.get(file, _NOTHING)[0] is True
            and SAID.intersection(names) == _TEXTS
        )

    def state(self) -> dict[str, Any]:
        """Return what it remembers of each file's first row, as JSON values."""
        return {
            "first": {file: (kind, at.line) for file, (kind, at) in self._first.items()},
            "plain": {file: (is_plain, at.line) for file, (is_plain, at) in self._plain.items()},
            "spelled": {file: (said, at.line) for file, (said, at) in self._spelled.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        memories: dict[str, dict[str, Any]] = {
            "first": self._first,
            "plain": self._plain,
            "spelled": self._spelled,
        }
        for name, memory in memories.items():
            values = state.get(name, {})
            memory.update({file: (said, Source(file, at)) for file, (said, at) in values.items()})

    def _check_kind(self, meaning: Meaning, source: Source) -> None:
        """Refuse what is not wanted, and what the file's first row was not."""
        if self.settings.demonstrations:
            return
        kind: Kind = "pair" if self._makes_pairs(meaning) else meaning.kind
        wanted = self.settings.kinds
        if wanted is not None and kind not in wanted:
            names = " or ".join(_CALLED[name] for name in wanted)
            raise InvalidRecordError("E206", f"the row is {_CALLED[kind]}, and {names} is wanted")
        first, place = self._first.setdefault(source.file, (kind, source))
        if kind != first:
            reason = f"the row is {_CALLED[kind]}, and {place} is {_CALLED[first]}"
            raise InvalidRecordError("E204", f"{reason}: put them into files of their own")

    def _check_plain(self, is_plain: bool, source: Source) -> None:
        """Refuse prompts that are plain text in one row and a user's turn in another."""
        first, place = self._plain.setdefault(source.file, (is_plain, source))
        if is_plain != first:
            names = "plain text", "messages, for a system prompt or a history stands beside it"
            this, that = names if is_plain else reversed(names)
            reason = f"the prompt is {this}, and that of {place} is {that}"
            raise InvalidRecordError("E204", f"{reason}: give every row the same keys")

    def _is_spelled(self, view: View, source: Source) -> bool:
        """Say whether strings spelled a row's chats; refuse a file where others were text."""
        if view.is_spelled is None or self.settings.strings:
            return False
        first, place = self._spelled.setdefault(source.file, (view.is_spelled, source))
        if view.is_spelled != first:
            names = "text", "lists of messages that were written as text"
            this, that = reversed(names) if view.is_spelled else names
            reason = f"the row's strings are {this}, and those of {place} are {that}"
            raise InvalidRecordError("E215", f"{reason}: {FLAGS}")
        return first

    def _makes_pairs(self, meaning: Meaning) -> bool:
        return meaning.kind == "group" and self.settings.lists != "groups"
