"""Read the wire format of protobuf messages, with the standard library only.

It covers what ONNX files contain: numbers, strings, bytes and nested messages. Anything that two
readers could understand differently is refused.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

from logratio.bundle.files import BundleError

Buffer = mmap.mmap | bytes
Span = tuple[int, int]
"""The first byte, and the byte after the last one."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_WIDTHS = {FIXED64: 8, FIXED32: 4}
_LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = 2**29 - 1
_FIELDS = 4_000_000
"""Fields and packed numbers read from one file: 15 seconds; the largest models have a quarter."""
_LONGEST_NAME = 2**16


class MalformedError(BundleError):
    """The bytes are not a protobuf message."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message.

    Attributes:
        number: The field's number.
        kind: The wire type.
        value: The number of a varint; 0 for other types.
        span: The bytes of the content, without its length.
    """

    number: int
    kind: int
    value: int
    span: Span


class Reader:
    """Reads the messages of one file, and limits how many fields it has."""

    def __init__(self, content: Buffer) -> None:
        self.content = content
        self._left = _FIELDS

    def fields(self, span: Span) -> Iterator[Field]:
        """Yield the fields of the message in `span`.

        Raises:
            MalformedError: The bytes are not a message, or the file has too many fields.
        """
        at, end = span
        while at < end:
            self._count()
            field = self._field(at, end)
            yield field
            at = field.span[1]

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise MalformedError(f"more than {_FIELDS:,} fields and numbers")

    def _field(self, at: int, end: int) -> Field:
        tag, at = self._varint(at, end)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= _LARGEST_NUMBER:
            raise MalformedError(f"field number {number}")
        value, start = 0, at
        if kind == VARINT:
            value, at = self._varint(at, end)
        elif kind == BYTES:
            size, start = self._varint(at, end)
            if size > _LARGEST_SIZE:
                raise MalformedError("a field is larger than 2 GiB")
            at = start + size
        elif kind in _WIDTHS:
            at += _WIDTHS[kind]
        else:
            raise MalformedError(f"wire type {kind}")
        if at > end:
            raise MalformedError("a field exceeds its message")
        return Field(number, kind, value, (start, at))

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end:
            byte = self.content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise MalformedError("a varint is longer than necessary")
                return value, at
            shift += 7
            if shift > 63:
                break
        raise MalformedError("a varint has no end")

    def bytes(self, span: Span) -> bytes:
        """Return the content of a field of bytes."""
        return self.content[slice(*span)]

    def text(self, span: Span) -> str:
        """Return the content of a field of text.

        Raises:
            MalformedError: It is not UTF-8, or too long for a name.
        """
        if span[1] - span[0] > _LONGEST_NAME:
            raise MalformedError(f"a name has more than {_LONGEST_NAME:,} bytes")
        try:
            return self.bytes(span).decode()
        except UnicodeDecodeError as error:
            raise MalformedError("a name is not UTF-8") from error

    def varints(self, span: Span) -> list[int]:
        """Return packed varints.

        Raises:
            MalformedError: The last one has no end.
        """
        at, end = span
        values = []
        while at < end:
            self._count()
            value, at = self._varint(at, end)
            values.append(value)
        return values


def signed(value: int) -> int:
    """Return the signed 64-bit number that a varint stores."""
    return value - 2**64 if value >= 2**63 else value
