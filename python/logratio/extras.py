"""Import what only an extra brings, or say in one sentence which extra is missing."""

import importlib
from types import ModuleType

from logratio.errors import LogratioError

ALONE = {"plots", "quantized", "ray", "trl"}
"""Extras without a `-cpu` twin: they run no graph."""


class MissingExtraError(LogratioError, ImportError):
    """A library is missing that an optional part of logratio needs."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which comes with `extra`.

    Args:
        module: dotted name of the module.
        extra: name in pyproject.toml of an extra that carries it: not that of a `-cpu` twin.

    Raises:
        MissingExtraError: `module` is not installed; the message has the line that installs it.
        ImportError: `module` is there, but something that it imports itself is not.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        twin = "" if extra in ALONE else f", or 'logratio[{extra}-cpu]' where there is no CUDA"
        raise MissingExtraError(
            f"{error.name} is not installed; it comes with pip install 'logratio[{extra}]'{twin}",
            name=error.name,
        ) from None
