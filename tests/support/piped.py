"""Stdin like a pipe: a few bytes at a time, and not seekable."""

import io
from typing import Any


class _Pipe(io.RawIOBase):
    def __init__(self, content: bytes, at_a_time: int) -> None:
        self._content = io.BytesIO(content)
        self._at_a_time = at_a_time

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        some = self._content.read(min(len(buffer), self._at_a_time))
        buffer[: len(some)] = some
        return len(some)


def piped(content: bytes, at_a_time: int = 37) -> io.TextIOWrapper:
    """Return what to put in place of `sys.stdin`."""
    return io.TextIOWrapper(io.BufferedReader(_Pipe(content, at_a_time)))
