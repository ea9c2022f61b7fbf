"""Files to rows: JSON lines, plain or gzip, read as a stream in constant memory."""

import errno
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from logratio.data.records import InvalidRecordError, Refusal, Source

MAX_LINE_BYTES = 64 << 20
"""A longer line is refused (E107): that is no record, it is a file without line ends."""

_SKIP_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"
_SPACE = b" \t\r\n"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ARRAY = (
    "the file is one JSON array, and one record a line is wanted: jq -c '.[]' FILE > records.jsonl"
)

Row = dict[str, Any]


class JsonLines:
    """The rows of one file, in order, each with its line; broken lines come as refusals.

    A byte order mark, CRLF and blank lines are accepted. gzip is told by its first bytes, not by
    the name.

    Attributes:
        name: The file's name as given.
        size: Bytes on disk.
        position: Bytes read so far (compressed bytes where it is compressed).
        blank_lines: Blank lines met so far.

    Raises:
        OSError: The file is missing, cannot be read, or is a folder.
    """

    def __init__(self, path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a folder; name the files in it", str(path))
        with path.open("rb"):
            self.size = path.stat().st_size
        self.name = path.as_posix()
        self.position = 0
        self.blank_lines = 0
        self._path = path
        self._max_line_bytes = max_line_bytes

    def __iter__(self) -> Iterator[tuple[Source, Row | Refusal]]:
        """Yield each line's source, and its object or what is wrong with it."""
        is_empty = True
        for line, content, is_cut in self._lines():
            source = Source(self.name, line)
            if isinstance(content, InvalidRecordError):
                yield source, Refusal(source, content.code, content.reason)
            elif not content.strip(_SPACE):
                self.blank_lines += 1
                continue
            elif is_empty and content.lstrip(_SPACE).startswith(b"["):
                yield source, Refusal(source, "E105", _ARRAY)
                return
            else:
                yield source, _parse(source, content.rstrip(_SPACE), is_cut=is_cut)
            is_empty = False
        if is_empty:
            source = Source(self.name, 0)
            yield source, Refusal(source, "E106", "the file is empty, or holds blank lines only")

    def _lines(self) -> Iterator[tuple[int, bytes | InvalidRecordError, bool]]:
        """Yield each line's number, its bytes or their fault, and whether it lacks its end."""
        with self._path.open("rb") as file:
            stream = _decompressed(file)
            line = 0
            while content := self._next_line(stream):
                line += 1
                self.position = min(file.tell(), self.size)
                if isinstance(content, InvalidRecordError):
                    yield line, content, False
                    if content.code != "E107":
                        break
                    continue
                content = content.removeprefix(_BOM) if line == 1 else content
                yield line, content, not content.endswith(b"\n")
        self.position = self.size

    def _next_line(self, stream: BinaryIO) -> bytes | InvalidRecordError:
        limit = self._max_line_bytes
        try:
            content = stream.readline(limit + 1)
            if len(content) <= limit or content.endswith(b"\n"):
                return content
            while content and not content.endswith(b"\n"):
                content = stream.readline(_SKIP_BYTES)
        except EOFError:
            return InvalidRecordError("E102", "the file ends inside its compressed data")
        except (gzip.BadGzipFile, zlib.error) as error:
            return InvalidRecordError("E108", f"the gzip data is damaged: {error}")
        return InvalidRecordError("E107", f"the line is longer than {limit:,} bytes")


def _decompressed(file: BinaryIO) -> BinaryIO:
    is_gzip = file.read(2) == _GZIP_MAGIC
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzip else file


def _parse(source: Source, content: bytes, *, is_cut: bool) -> Row | Refusal:
    """Parse one line; ``is_cut`` when the file ended before the line did."""
    try:
        return _object(content.decode())
    except UnicodeDecodeError as error:
        if is_cut and error.end == len(content) and "unexpected end" in error.reason:
            return Refusal(source, "E102", "the file ends inside a character")
        reason = f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})"
        return Refusal(source, "E103", reason, error.start + 1)
    except json.JSONDecodeError as error:
        if is_cut and _looks_cut(error):
            return Refusal(source, "E102", "the file ends inside a record", error.pos + 1)
        return Refusal(source, "E101", f"malformed JSON: {error.msg}", error.pos + 1)
    except InvalidRecordError as error:
        return Refusal(source, error.code, error.reason)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 1,000 brackets
        return Refusal(source, "E101", f"JSON that cannot be read: {error}")


def _looks_cut(error: json.JSONDecodeError) -> bool:
    """Say whether a line without its end was cut, and is not merely malformed."""
    return not error.doc.endswith("}") or error.pos >= len(error.doc)


def _object(text: str) -> Row:
    row = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(row, dict):
        raise InvalidRecordError("E203", f"a record must be a JSON object, not {json_type(row)}")
    if _SURROGATE.search(text):
        _check_surrogates(row)
    return row


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRecordError("E205", f"the key {twice!r} stands twice in one object")
    return row


def _check_surrogates(row: Row) -> None:
    """Refuse halves of characters: Python holds them, no tokenizer and no file takes them."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InvalidRecordError("E104", f"the escape \\u{code:04x} is half a character") from None


def json_type(value: object) -> str:
    """Name a value's type as JSON does."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
