"""Import optional dependencies, with an error message that names the missing extra."""

import importlib
import os
from types import ModuleType

from logratio.errors import LogratioError

WITHOUT_CPU_VARIANT = {"otel", "plots", "quantized", "ray", "trl"}
"""Extras without a `-cpu` variant, because they do not need ONNX Runtime."""

_SILENCED = {"onnxruntime": "ORT_DISABLE_TELEMETRY"}
"""Modules that otherwise send data about models and runs to their makers, and the variables that
prevent it if they are set before the import: ONNX Runtime does so on Linux since version 1.29."""


class MissingExtraError(LogratioError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which `extra` installs, and keep it from sending telemetry.

    Args:
        module: Dotted name of the module.
        extra: Name in pyproject.toml of an extra with the module, without `-cpu`.

    Returns:
        The module.

    Raises:
        MissingExtraError: `module` is not installed; the message has the command to install it.
        ImportError: `module` is installed, but one of its imports is not.
    """
    if variable := _SILENCED.get(module.partition(".")[0]):
        os.environ.setdefault(variable, "1")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        variant = (
            "" if extra in WITHOUT_CPU_VARIANT else f", or 'logratio[{extra}-cpu]' without CUDA"
        )
        raise MissingExtraError(
            f"{error.name} is not installed: pip install 'logratio[{extra}]'{variant}",
            name=error.name,
        ) from None
