"""Files that are on the disk when a call returns, and whole under their names."""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle(path: Path) -> None:
    """Sync a finished file, and give it the mode that the umask allows.

    safetensors makes its files readable by their owner alone, whatever the umask is.
    """
    path.chmod(_mode_of_new_files(path.parent))
    sync(path)


def _mode_of_new_files(folder: Path) -> int:
    """Return the mode of a file that is made in `folder`; asking for the umask would change it."""
    probe = folder / f".mode-{secrets.token_hex(8)}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; it becomes `path` where nothing goes wrong, or goes.

    A crash leaves the old file or the new one.
    """
    # No number of the process: those of two hosts on one folder may be the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that comes whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise what a library reports of the disk in an error of its own as an `OSError` of `path`.

    safetensors raises a `SafetensorError` where the disk is full.
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
    """Hold a folder for this process until the block ends; the lock goes with the process.

    File systems that lock no folders (some network file systems) let everybody in.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
