"""The journals of one writer, one after the other."""

from collections.abc import Callable

from logratio._rust import CacheWriter

JOURNAL_BYTES = 2**30
"""A journal of this size is full: it is sealed, and another one is begun."""


class Journals:
    """Appends durable blocks; a full journal becomes a sealed shard.

    Attributes:
        nbytes: written so far, in all journals.
    """

    def __init__(self, begin: Callable[[], CacheWriter], most: int = JOURNAL_BYTES) -> None:
        self._begin, self._most = begin, most
        self._writer = begin()
        self._sealed_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes written so far, in all journals."""
        return self._sealed_bytes + self._writer.file_bytes

    def append(self, write: Callable[[CacheWriter], None]) -> None:
        """Let `write` append a block, which is durable when this returns or raises nothing.

        Raises:
            OSError: the disk is full; what was acknowledged is in the cache.
        """
        write(self._writer)
        if self._writer.file_bytes >= self._most:
            self._sealed_bytes += self._writer.file_bytes
            self._writer.seal()
            self._writer = self._begin()

    def seal(self) -> None:
        """Make the last journal a sealed shard; nothing can be appended after."""
        self._writer.seal()

    def close(self) -> None:
        """Let go of the last journal, sealed or not."""
        self._writer.close()
