"""CSV with a header line. A record takes one line, or several if a quoted cell has line breaks."""

import csv
from collections.abc import Iterator
from io import BufferedReader
from itertools import chain
from typing import Any

from logratio.data.readers.rows import OTHER_ENCODING, Row, TextRows
from logratio.data.records import InvalidRecordError, Refusal, Source


def delimiter_of(header: str) -> str:
    """Return the delimiter of a header: the first of comma, tab and semicolon that it contains."""
    return next((delimiter for delimiter in ",\t;" if delimiter in header), ",")


class CsvRecords(TextRows):
    """The records of a CSV file, each with the physical line on which it begins.

    The first record names the columns; `delimiter_of` detects the delimiter. Cells are text, even
    if they contain JSON: the formats interpret them. An empty cell is "".

    A record with a different number of cells is refused (E110). Reading stops (E111) at malformed
    quotes or at a record over the size limit, because the start of the next record is unknown.
    """

    def _restart(self) -> None:
        super()._restart()
        self._header: list[str] = list(self._first.get("header", []))
        self._delimiter = str(self._first.get("delimiter", ","))
        self._held = 0  # bytes of the current record
        self._fault: UnicodeDecodeError | None = None  # the first one in the current record
        self._is_cut = False

    def mark(self) -> dict[str, Any]:
        """Return the position after the record that was yielded last."""
        return super().mark() | {"header": self._header, "delimiter": self._delimiter}

    def _records(self) -> Iterator[tuple[Source, Row | Refusal]]:
        # The csv module has one limit per process, so it is only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), self._limit))
        first = self._line + 1
        try:
            texts = self._texts(self._source.open(self._offset))
            if not self._header:
                self._read_header(texts)
            first = self._line + 1
            for cells in csv.reader(texts, delimiter=self._delimiter, strict=True):
                if cells:
                    self._is_empty = False
                    source = Source(self.name, first)
                    yield source, self._row(source, cells)
                else:
                    self.blank_lines += 1
                self._held, self._fault = 0, None
                first = self._line + 1
        except InvalidRecordError as error:
            yield self._last(error, line=first)
        except csv.Error as error:
            yield self._last(_malformed(error), line=first)

    def _texts(self, lines: BufferedReader) -> Iterator[str]:
        """Yield lines as text. Invalid UTF-8 is recorded, so that `_row` refuses the record."""
        while content := lines.readline(self._limit + 1):
            self._line += 1
            self._offset += len(content)
            self._held += len(content)
            self._is_cut = content[-1:] != b"\n"
            if self._held > self._limit:
                reason = f"a record is longer than {self._limit:,} bytes, or a quote is not closed"
                raise InvalidRecordError("E111", reason)
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                self._fault = self._fault or error
                yield content.decode(errors="replace")

    def _read_header(self, texts: Iterator[str]) -> None:
        for text in texts:
            text = text.removeprefix("\ufeff")
            if text.strip():
                break
            self.blank_lines += 1
        else:
            return
        self._delimiter = delimiter_of(text)
        lines = chain([text], texts)
        cells = next(csv.reader(lines, delimiter=self._delimiter, strict=True))
        if self._fault:
            reason = f"the header is not UTF-8 ({self._fault.reason}): {OTHER_ENCODING}"
            raise InvalidRecordError("E111", reason)
        names = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, 1)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InvalidRecordError("E113", f"two columns are named {twice!r}")
        self._header, self._held = names, 0

    def _row(self, source: Source, cells: list[str]) -> Row | Refusal:
        if self._fault:
            what = f"byte {self._fault.start + 1} of a line is not UTF-8 ({self._fault.reason})"
            reason = f"{what}: {OTHER_ENCODING}"
            return Refusal(source, "E103", reason)
        if len(cells) != len(self._header):
            reason = f"{len(cells)} cells, but the header names {len(self._header)} columns"
            if self._is_cut and len(cells) < len(self._header):
                return Refusal(source, "E102", f"the file ends inside a record: {reason}")
            return Refusal(source, "E110", reason)
        return dict(zip(self._header, cells, strict=True))


def _malformed(error: csv.Error) -> InvalidRecordError:
    if "unexpected end of data" in str(error):
        return InvalidRecordError("E102", "the file ends inside a quoted cell")
    return InvalidRecordError("E111", f"malformed quotes: {error}")
