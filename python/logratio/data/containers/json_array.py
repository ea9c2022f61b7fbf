"""One JSON array of objects, read element by element in bounded memory."""

import re
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from logratio.data.containers.json_lines import BOM
from logratio.data.containers.json_text import parse_record
from logratio.data.containers.rows import SPACE, Row, TextRows
from logratio.data.containers.sources import HEAD
from logratio.data.records import InvalidRecordError, Refusal, Source

MAX_DEPTH = 10_000

# Over text and whole strings, up to what gives an element its shape; a quote: a string that has not
# ended yet. Inside brackets commas say nothing.
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


class JsonArray(TextRows):
    """The elements of one JSON array, each with the line on which it begins.

    The array may be all that an object holds, under whatever key: ``{"data": [{…}, {…}]}``.

    An element that is no sound record is refused like a line; the array ends (E109) where its
    brackets do not fit, or an element is longer than a record may be: what is one element and
    what the next cannot be known behind that place.
    """

    def _restart(self) -> None:
        super()._restart()
        self._line = int(self._first.get("line", 1))
        self._line_start = int(self._first.get("line_start", 0))
        self._is_open = bool(self._first.get("is_open", False))
        self._is_held = bool(self._first.get("is_held", False))

    def mark(self) -> dict[str, Any]:
        """Return the place behind the element that was yielded last."""
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
        """Step over what opens the array, once: its bracket, and the key of an object around it."""
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
        """Go to the next element; None: the array ends here. True: no comma is before it."""
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
            raise InvalidRecordError("E109", "something stands behind the end of the JSON array")

    def _skip_space(self, text: "_Text") -> None:
        while True:
            found = _NOT_SPACE.search(text.buffer, text.start)
            self._pass(text, found.start() if found else len(text.buffer))
            if found or not text.grow():
                return

    def _pass(self, text: "_Text", end: int) -> None:
        """Step over the bytes before `end`, and count lines."""
        lines = text.buffer.count(b"\n", text.start, end)
        if lines:
            self._line += lines
            last = text.buffer.rindex(b"\n", text.start, end)
            self._line_start = self._offset + last - text.start + 1
        self._offset += end - text.start
        text.start = end


class _Text:
    """A window on a stream: what is before `start` was read and may go."""

    def __init__(self, stream: BufferedReader) -> None:
        self.buffer = b""
        self.start = 0
        self._stream = stream

    def peek(self, count: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        while len(self.buffer) - self.start < count and self.grow():
            pass
        return self.buffer[self.start : self.start + count]

    def grow(self) -> int:
        """Read on, twice as much as is held; say how many bytes more there are."""
        held = self.buffer[self.start :]
        more = self._stream.read(max(_BLOCK, len(held)))
        self.buffer, self.start = held + more, 0
        return len(more)


def _element_end(text: _Text, limit: int) -> int:
    """Return where in the buffer the element at its start ends.

    Raises:
        InvalidRecordError: E102 and E108 where the data ends or is damaged, E109 where the
            element cannot be followed.
    """
    opened = bytearray()
    scanned = 0  # from the element's start: the buffer moves when it grows
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
    """Count a bracket in or out."""
    if token in b"[{":
        opened.append(token)
        if len(opened) > MAX_DEPTH:
            raise InvalidRecordError("E109", "brackets are nested too deeply to be followed")
    elif token in _OPENED_BY and (not opened or opened.pop() != _OPENED_BY[token]):
        reason = f"the brackets of this element do not fit at {chr(token)!r}"
        raise InvalidRecordError("E109", reason)


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        reason = f"an element is longer than {limit:,} bytes, or its brackets do not close"
        raise InvalidRecordError("E109", reason)


def _record(source: Source, element: bytes, column: int, *, is_first: bool) -> Row | Refusal:
    if not element:
        where = "in front of the first comma" if is_first else "behind a comma"
        return Refusal(source, "E101", f"malformed JSON: no element {where}", column)
    return parse_record(source, element, column=column)
