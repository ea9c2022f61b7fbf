"""JSON lines: one object a line."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from logratio.data.containers.json_text import parse_record
from logratio.data.containers.rows import SPACE, Row, TextRows
from logratio.data.records import InvalidRecordError, Refusal, Source

BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 1 << 20
_ARRAY = (
    "a JSON array behind more blank lines than are looked through: remove them, or write one "
    "record a line"
)
_SPREAD = "write an object in one line, or objects that take several into a list: [{…}, {…}]"


class JsonLines(TextRows):
    """The rows of JSON lines, each with its line; broken lines come as refusals.

    A byte order mark, CRLF and blank lines are accepted.
    """

    def _records(self) -> Iterator[tuple[Source, Row | Refusal]]:
        name, limit = self.name, self._limit
        try:
            readline = self._source.open(self._offset).readline
            while content := readline(limit + 1):
                self._line += 1
                self._offset += len(content)
                source = Source(name, self._line)
                is_cut = content[-1:] != b"\n"
                if is_cut and len(content) > limit:
                    self._skip_line(readline)
                    self._is_empty = False
                    yield self._too_long(source)
                    continue
                if self._line == 1:
                    content = content.removeprefix(BOM)
                record = content.strip(SPACE)
                if not record:
                    self.blank_lines += 1
                    continue
                if self._is_empty and record[:1] == b"[":
                    yield self._last(InvalidRecordError("E105", _ARRAY), line=self._line)
                    return
                self._is_empty = False
                column = content.find(record[:1]) + 1
                row = parse_record(source, record, column=column, is_cut=is_cut)
                if isinstance(row, Refusal) and row.code == "E101" and _goes_on(record, self._line):
                    row = replace(row, reason=f"{row.reason}: {_SPREAD}")
                yield source, row
        except InvalidRecordError as error:
            self._line += 1
            yield self._last(error, line=self._line)

    def _skip_line(self, readline: Callable[[int], bytes]) -> None:
        while content := readline(_SKIP_BYTES):
            self._offset += len(content)
            if content[-1:] == b"\n":
                return

    def _too_long(self, source: Source) -> tuple[Source, Refusal]:
        return source, Refusal(source, "E107", f"the line is longer than {self._limit:,} bytes")


def _goes_on(record: bytes, line: int) -> bool:
    """Say whether a file's first line is the beginning of an object, and no more of it."""
    return line == 1 and record[:1] == b"{" and record[-1:] in b"{[,"
