"""gzip, zstd and text encodings: streams of bytes to streams of UTF-8.

gzip and zstd may have several members in one file, and each way to be broken has one sentence.

Memory: 32 KiB for gzip; for zstd the window that a frame asks for, at most 128 MiB (the format's
own advice), above which the frame is refused.
"""

import codecs
import gzip
import io
import zlib
from typing import BinaryIO, cast

from logratio.data.containers.arrow_library import arrow, is_damage
from logratio.data.records import InvalidRecordError

GZIP, ZSTD = "gzip", "zstd"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK = 1 << 16
_CUT = "the file ends inside its compressed data"


def packing(first: bytes) -> str:
    """Tell by the first four bytes how something is packed; "": not at all."""
    if first.startswith(b"\x1f\x8b"):
        return GZIP
    is_skippable = len(first) == 4 and first[1:] == b"\x2a\x4d\x18" and first[0] >> 4 == 5
    return ZSTD if first == _ZSTD_MAGIC or is_skippable else ""


def unpacked(packed: io.RawIOBase, kind: str) -> io.RawIOBase:
    """Return a raw stream of what is packed; its reads raise InvalidRecordError (E102, E108)."""
    if kind == GZIP:
        return _Gzip(packed)
    return _Zstd(packed) if kind == ZSTD else packed


def transcoded(stream: io.RawIOBase, encoding: str) -> io.RawIOBase:
    """Return a raw stream of UTF-8, of text in another encoding.

    Bytes that are invalid in that encoding become a byte that is invalid in UTF-8, so that only
    the record with them is refused.
    """
    return _Transcoded(stream, encoding)


class _Transcoded(io.RawIOBase):
    def __init__(self, stream: io.RawIOBase, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(_NO_TEXT)
        self._ready = b""
        self._is_at_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and not self._is_at_end:
            content = self._stream.read(_BLOCK)
            self._is_at_end = not content
            text = self._decoder.decode(content or b"", final=self._is_at_end)
            self._ready = text.encode("utf-8", "surrogateescape")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _no_text(error: UnicodeError) -> tuple[str, int]:
    """Put what `surrogateescape` writes as the byte 0x80 in the place of bytes that are no text."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80", error.end


_NO_TEXT = "logratio-no-text"
codecs.register_error(_NO_TEXT, _no_text)


class _Gzip(io.RawIOBase):
    def __init__(self, packed: io.RawIOBase) -> None:
        self._packed = packed
        self._file = gzip.GzipFile(fileobj=cast(BinaryIO, io.BufferedReader(packed, 1 << 17)))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._file.readinto(buffer)
        except EOFError:
            raise InvalidRecordError("E102", _CUT) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise InvalidRecordError("E108", f"the gzip data is damaged: {error}") from None

    def close(self) -> None:
        self._packed.close()
        super().close()


class _Zstd(io.RawIOBase):
    def __init__(self, packed: io.RawIOBase) -> None:
        library = arrow("zstd")
        self._packed = packed
        self._file = library.CompressedInputStream(library.PythonFile(packed, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return int(self._file.readinto(buffer))
        except OSError as error:
            if not is_damage(error):
                raise
            if "Truncated" in str(error):
                raise InvalidRecordError("E102", _CUT) from None
            reason = str(error).removeprefix("ZSTD decompress failed: ")
            raise InvalidRecordError("E108", f"the zstd data is damaged: {reason}") from None

    def close(self) -> None:
        self._packed.close()
        super().close()
