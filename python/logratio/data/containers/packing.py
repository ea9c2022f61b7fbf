"""gzip and zstd: several members in one file, and one sentence for each way to be broken.

Memory: 32 KiB for gzip; for zstd the window that a frame asks for, at most 128 MiB (the format's
own advice), above which the frame is refused.
"""

import gzip
import io
import zlib
from typing import BinaryIO, cast

from logratio.data.containers.arrow_library import arrow, is_damage
from logratio.data.records import InvalidRecordError

GZIP, ZSTD = "gzip", "zstd"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
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
