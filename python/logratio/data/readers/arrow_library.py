"""Import pyarrow on first use, or raise an error with the command that installs it."""

from types import ModuleType

from logratio.errors import LogratioError


class MissingArrowError(LogratioError, ImportError):
    """pyarrow is needed but not installed."""


def arrow(wanted_for: str) -> ModuleType:
    """Import pyarrow with its submodules for IPC and Parquet.

    Args:
        wanted_for: The kind of data to read, for the error message.

    Raises:
        MissingArrowError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        message = f"{wanted_for} cannot be read without pyarrow: pip install pyarrow"
        raise MissingArrowError(message, name="pyarrow") from None
    module: ModuleType = pyarrow
    return module


def is_damage(error: BaseException) -> bool:
    """Return whether an exception from pyarrow means damaged data rather than a disk failure."""
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, ValueError | MemoryError | KeyError | TypeError | NotImplementedError)
