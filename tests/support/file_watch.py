"""Notice when any process opens a file, with Linux's inotify."""

import ctypes
import os
from pathlib import Path
from types import TracebackType

_OPENED_OR_READ = 0x20 | 0x1  # IN_OPEN, IN_ACCESS
_NONBLOCK = 0x800
_EVENT_BYTES = 16


class FileWatch:
    """Counts how often a file is opened or read, under any of its names, within a ``with``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "FileWatch":
        library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = library.inotify_init1(_NONBLOCK)
        watch = library.inotify_add_watch(
            self._descriptor, os.fsencode(self._path), _OPENED_OR_READ
        )
        if self._descriptor < 0 or watch < 0:
            raise OSError(ctypes.get_errno(), "inotify cannot watch", str(self._path))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def events(self) -> int:
        """How often the file was opened or read since the last call."""
        try:
            return len(os.read(self._descriptor, 2**16)) // _EVENT_BYTES
        except BlockingIOError:
            return 0
