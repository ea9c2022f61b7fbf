"""JSON lines and JSON arrays, read in bounded memory."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BufferedReader
from typing import Any

from logratio.data.readers.rows import HEAD, OTHER_ENCODING, SPACE, Row, TextRows
from logratio.data.records import InvalidRecordError, Refusal, Source
from logratio.validation import with_article

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NAMES = re.compile(r'"\s*+:')
_raw_decode = json.JSONDecoder().raw_decode


def parse_record(
    source: Source, content: bytes, *, column: int | None = 1, is_cut: bool = False
) -> dict[str, Any] | Refusal:
    """Parse one record.

    Args:
        source: Where the record is.
        content: UTF-8, without white space around it.
        column: Column of its line at which the record begins, from 1. None: report no column.
        is_cut: Whether the file ends without a line end after the record.

    Returns:
        The object, or a refusal.
    """
    try:
        return _object(content.decode())
    except UnicodeDecodeError as error:
        if is_cut and error.end == len(content) and "unexpected end" in error.reason:
            return Refusal(source, "E102", "the file ends inside a character")
        reason = (
            f"byte {error.start + 1} of the record is not UTF-8 ({error.reason}): {OTHER_ENCODING}"
        )
        return Refusal(source, "E103", reason, column and column + error.start)
    except json.JSONDecodeError as error:
        return _malformed(source, error, column, is_cut)
    except InvalidRecordError as error:
        return Refusal(source, error.code, error.reason)
    except (
        ValueError,
        RecursionError,
    ) as error:  # e.g. a number of 5,000 digits, or 1,000 nested brackets
        return Refusal(source, "E101", f"JSON that cannot be read: {error}")


def parse_value(text: str) -> Any:
    """Parse JSON from a cell of a table.

    Raises:
        ValueError: The text is not JSON.
        InvalidRecordError: The JSON has a lone surrogate (E104) or a repeated key (E205).
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def json_type(value: object) -> str:
    """Return the JSON name of a value's type with its article; the Python name of other types."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if type(value) in names or value is None:
        return names.get(type(value), "null")
    return "a number" if isinstance(value, int | float) else with_article(type(value).__name__)


def _object(text: str) -> dict[str, Any]:
    row, end = _raw_decode(text)
    # Parsing without a hook takes half the time. The hook is needed only if a key is repeated: then
    # the text has more `"…":` than the object has keys.
    if end != len(text) or type(row) is not dict or len(_NAMES.findall(text)) != _count_names(row):
        row = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(row, dict):
        raise InvalidRecordError("E203", f"a record must be a JSON object, not {json_type(row)}")
    if _SURROGATE.search(text):
        _check_surrogates(row)
    return row


def _count_names(row: dict[str, Any]) -> int:
    """Count the keys in an object, at any depth."""
    count = len(row)
    for value in row.values():
        if type(value) is list:
            count += sum([_count_in(item) for item in value])
        elif type(value) is dict:
            count += _count_names(value)
    return count


def _count_in(item: Any) -> int:
    if type(item) is dict:
        return _count_names(item)
    return sum([_count_in(inner) for inner in item]) if type(item) is list else 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRecordError("E205", f"the key {twice!r} occurs twice in one object")
    return row


def _check_surrogates(value: Any) -> None:
    """Raise E104 for lone surrogates: Python strings can hold them, UTF-8 cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InvalidRecordError("E104", f"the escape \\u{code:04x} is half a character") from None


def _malformed(
    source: Source, error: json.JSONDecodeError, column: int | None, is_cut: bool
) -> Refusal:
    if error.lineno > 1:  # of a record over several lines
        column, where = None, f" (line {error.lineno} of the record, column {error.colno})"
    else:
        column, where = column and column + error.pos, ""
    if is_cut and _looks_cut(error):
        return Refusal(source, "E102", "the file ends inside a record", column)
    return Refusal(source, "E101", f"malformed JSON: {error.msg}{where}", column)


def _looks_cut(error: json.JSONDecodeError) -> bool:
    """Return whether a line without a line end was truncated, rather than malformed."""
    return not error.doc.endswith("}") or error.pos >= len(error.doc)


BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 1 << 20
_ARRAY = "a JSON array after too many blank lines: remove them, or write one record per line"
_SPREAD = "write each object on one line, or put the objects into a list: [{…}, {…}]"


class JsonLines(TextRows):
    """The rows of a JSON lines file, each with its line; malformed lines are refusals.

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
                if (
                    isinstance(row, Refusal)
                    and row.code == "E101"
                    and _is_unfinished(record, self._line)
                ):
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


def _is_unfinished(record: bytes, line: int) -> bool:
    """Return whether a file's first line is only the beginning of an object."""
    return line == 1 and record[:1] == b"{" and record[-1:] in b"{[,"


MAX_DEPTH = 10_000

# Each pattern skips text and whole strings up to the next structural character. A match at a quote
# means that the string has not ended in the buffer. Commas only matter outside brackets.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_INSIDE = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb')*+(["\[\]{}])', re.DOTALL)
_OUTSIDE = re.compile(rb'(?:[^",\[\]{}]++|' + _STRING + rb')*+(["\[\]{},])', re.DOTALL)
_COMMA = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+")
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
_OPENED_BY = {ord("]"): ord("["), ord("}"): ord("{")}
_BLOCK = 1 << 17


_KEY = rb'"(?P<%s>[^"\\]{1,64})"[ \t\r\n]*:[ \t\r\n]*'
HOLDS_ROWS = re.compile(
    rb"(\{[ \t\r\n]*" + _KEY % b"key" + rb"\[)[ \t\r\n]*\{[ \t\r\n]*" + _KEY % b"inner"
)
"""The beginning of an object whose first key holds a list of objects: ``{"data": [{``."""
HOLDERS = (
    *("data", "rows", "examples", "instances", "items", "records", "entries", "samples"),
    *("train", "validation", "test", "dataset"),
)
"""Usual keys of a list of rows in an object around it."""


class JsonArray(TextRows):
    """The elements of one JSON array, each with the line on which it begins.

    The array may be the only value of an object, under any key: ``{"data": [{…}, {…}]}``.

    A malformed element is refused like a line. Reading stops (E109) at mismatched brackets or at
    an element over the size limit, because the start of the next element is unknown.
    """

    def _restart(self) -> None:
        super()._restart()
        self._line = int(self._first.get("line", 1))
        self._line_start = int(self._first.get("line_start", 0))
        self._is_open = bool(self._first.get("is_open", False))
        self._is_held = bool(self._first.get("is_held", False))

    def mark(self) -> dict[str, Any]:
        """Return the position after the element that was yielded last."""
        return super().mark() | {
            "line_start": self._line_start,
            "is_open": self._is_open,
            "is_held": self._is_held,
        }

    def _records(self) -> Iterator[tuple[Source, Row | Refusal]]:
        try:
            text = _Text(self._source.open(self._offset))
            self._open(text)
            while (begins := self._next_element(text)) is not None:
                end = _element_end(text, self._limit)
                element = text.buffer[text.start : end].rstrip(SPACE)
                source = Source(self.name, self._line)
                column = self._offset - self._line_start + 1
                self._pass(text, end)
                self._is_empty = False
                yield source, _record(source, bytes(element), column, is_first=begins)
            self._check_end(text)
        except InvalidRecordError as error:
            yield self._last(error, line=self._line)

    def _open(self, text: "_Text") -> None:
        """Skip the start of the array, once: its bracket, and the key of an object around it."""
        self._is_first = not self._is_open
        if not self._is_open:
            if text.peek(len(BOM)) == BOM:
                self._pass(text, len(BOM))
            self._skip_space(text)
            text.peek(HEAD)
            held = HOLDS_ROWS.match(text.buffer, text.start)
            self._is_held = held is not None
            self._pass(text, held.end(1) if held else text.start + 1)
            self._is_open = True

    def _next_element(self, text: "_Text") -> bool | None:
        """Move to the next element.

        Returns:
            Whether it is the first, without a comma before it; None at the end of the array.
        """
        comma = None if self._is_first else _COMMA.match(text.buffer, text.start)
        if comma and comma.end() < len(text.buffer):
            self._pass(text, comma.end())
            return False
        self._skip_space(text)
        is_first, self._is_first = self._is_first, False
        if text.peek(1) == b"]":
            self._pass(text, text.start + 1)
            return None
        if not is_first and text.peek(1) == b",":
            self._pass(text, text.start + 1)
            self._skip_space(text)
        if not text.peek(1):
            raise InvalidRecordError("E102", "the file ends inside the JSON array")
        return is_first

    def _check_end(self, text: "_Text") -> None:
        self._skip_space(text)
        if self._is_held:
            if text.peek(1) != b"}":
                reason = "something follows the list of rows in the object that holds it"
                raise InvalidRecordError("E109", reason)
            self._pass(text, text.start + 1)
            self._skip_space(text)
        if text.peek(1):
            raise InvalidRecordError("E109", "something follows the end of the JSON array")

    def _skip_space(self, text: "_Text") -> None:
        while True:
            found = _NOT_SPACE.search(text.buffer, text.start)
            self._pass(text, found.start() if found else len(text.buffer))
            if found or not text.grow():
                return

    def _pass(self, text: "_Text", end: int) -> None:
        """Skip the bytes before `end` and count their lines."""
        lines = text.buffer.count(b"\n", text.start, end)
        if lines:
            self._line += lines
            last = text.buffer.rindex(b"\n", text.start, end)
            self._line_start = self._offset + last - text.start + 1
        self._offset += end - text.start
        text.start = end


class _Text:
    """A window on a stream; the bytes before `start` may be discarded."""

    def __init__(self, stream: BufferedReader) -> None:
        self.buffer = b""
        self.start = 0
        self._stream = stream

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes, or fewer at the end."""
        while len(self.buffer) - self.start < count and self.grow():
            pass
        return self.buffer[self.start : self.start + count]

    def grow(self) -> int:
        """Read more, doubling the buffer; return the number of new bytes."""
        held = self.buffer[self.start :]
        more = self._stream.read(max(_BLOCK, len(held)))
        self.buffer, self.start = held + more, 0
        return len(more)


def _element_end(text: _Text, limit: int) -> int:
    """Return the buffer position at which the element at `text.start` ends.

    Raises:
        InvalidRecordError: E102 or E108 if the data ends or is damaged, E109 if the brackets of the
            element do not match or it is too long.
    """
    opened = bytearray()
    scanned = 0  # relative to the element's start, because the buffer moves when it grows
    while True:
        pattern = _INSIDE if opened else _OUTSIDE
        found = pattern.match(text.buffer, text.start + scanned)
        if found is None or found[1] == b'"':
            _check_length(len(text.buffer) - text.start, limit)
            if not text.grow():
                raise InvalidRecordError("E102", "the file ends inside a record")
            continue
        if not opened and found[1] in b",]":
            _check_length(found.start(1) - text.start, limit)
            return found.start(1)
        scanned = found.end() - text.start
        _nest(opened, found[1][0])


def _nest(opened: bytearray, token: int) -> None:
    """Push an opening bracket, or pop the one that a closing bracket matches."""
    if token in b"[{":
        opened.append(token)
        if len(opened) > MAX_DEPTH:
            raise InvalidRecordError("E109", f"brackets are nested more than {MAX_DEPTH:,} deep")
    elif token in _OPENED_BY and (not opened or opened.pop() != _OPENED_BY[token]):
        reason = f"the brackets of this element do not match at {chr(token)!r}"
        raise InvalidRecordError("E109", reason)


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        reason = f"an element is longer than {limit:,} bytes, or its brackets do not close"
        raise InvalidRecordError("E109", reason)


def _record(source: Source, element: bytes, column: int, *, is_first: bool) -> Row | Refusal:
    if not element:
        where = "before the first comma" if is_first else "after a comma"
        return Refusal(source, "E101", f"malformed JSON: no element {where}", column)
    return parse_record(source, element, column=column)
