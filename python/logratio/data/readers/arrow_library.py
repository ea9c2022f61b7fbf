"""pyarrow, loaded when it is needed, or a sentence that says how to get it."""

from types import ModuleType

from logratio.errors import LogratioError


class MissingArrowError(LogratioError, ImportError):
    """pyarrow is not installed, and what was asked for needs it."""


def arrow(wanted_for: str) -> ModuleType:
    """Import pyarrow with its submodules for IPC and Parquet.

    Args:
        wanted_for: What is to be read, for the message.

    Raises:
        MissingArrowError: It is not installed.
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
    """Say whether an exception of pyarrow's tells of damaged data, not of a failing disk."""
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, ValueError | MemoryError | KeyError | TypeError | NotImplementedError)
