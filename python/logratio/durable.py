"""Write files atomically, and synced to disk when the call returns."""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finalize(path: Path) -> None:
    """Sync a finished file, and set the file mode of the umask.

    safetensors ignores the umask and makes its files readable only by their owner.
    """
    path.chmod(_mode_of_new_files(path.parent))
    sync(path)


def _mode_of_new_files(folder: Path) -> int:
    """Return the mode of new files in `folder`; reading the umask itself would change it."""
    probe = folder / f".mode-{secrets.token_hex(8)}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, else remove it.

    After a crash, `path` is either the old file or the new one.
    """
    # A random name: process ids on two hosts that share the folder may be equal.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically; creates its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Convert a library's own exception about the file system to an `OSError` of `path`.

    For example, safetensors raises a `SafetensorError` if the disk is full.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if found := _SYSTEM_ERROR.search(str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process until the block or the process ends.

    On file systems without locks (some network file systems) it has no effect.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> None:
    """Lock an open file or folder until it is closed; see `locked`.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass
