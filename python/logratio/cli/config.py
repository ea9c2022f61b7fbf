"""Settings of a command from a YAML file (`--config FILE`) and from environment variables."""

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from logratio.cli.options import Command, with_parameters
from logratio.config_file import FLAGS, flat, read_values
from logratio.errors import ConfigError

PARAMETERS: Mapping[str, str] = {"format": "format_name"} | {
    field: flag for flag, field in FLAGS.items()
}
"""Parameters of the commands with another name than the field that they set."""


def takes_config(
    name: str, module: str = "logratio.training", *, example: str = "lr: 1e-6"
) -> Callable[[Command], Command]:
    """Give a command the option `--config`, with the settings that one of its classes has.

    The file's values become the defaults of the command's flags, so that flags override them, and
    a required flag may be in the file.

    Args:
        name: The class of the settings.
        module: The module of the class, which is imported only if a file is given.
        example: A line of a file, for the help.
    """

    def decorated(command: Command) -> Command:
        @wraps(command)
        def called(*, config: Path | None = None, **given: Any) -> None:
            del config  # read by the callback, before any other flag
            command(**given)

        def read(context: typer.Context, path: Path | None) -> Path | None:
            if path is not None and not context.resilient_parsing:
                _set_defaults(context, getattr(import_module(module), name), path)
            return path

        option = typer.Option(
            "--config",
            metavar="FILE",
            help=f"YAML file with settings: `{example}`, one per line. Flags override it. Paths in "
            "it are relative to the working directory.",
            callback=read,
            is_eager=True,
        )
        parameter = inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, option],
        )
        return with_parameters(called, [*inspect.signature(command).parameters.values(), parameter])

    return decorated


def takes_environment(command: Command) -> Command:
    """Give each flag of a command an environment variable: `LOGRATIO_PORT` for `--port`.

    Flags override the variables, and the variables override the file of `--config`.
    """

    @wraps(command)
    def called(**given: Any) -> None:
        command(**given)

    known = inspect.signature(command).parameters.values()
    return with_parameters(called, [_with_variable(parameter) for parameter in known])


def _with_variable(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter whose option reads a variable; commands may share the option itself."""
    kind, shared = get_args(parameter.annotation)
    option = copy(shared)
    option.envvar = f"LOGRATIO_{parameter.name.upper()}"
    return parameter.replace(annotation=Annotated[kind, option])


def _set_defaults(context: typer.Context, kind: type, path: Path) -> None:
    """Make the settings in the file the defaults of the command's flags."""
    parameters = {one.name: one for one in context.command.params}
    settings = flat(kind, read_values(kind, path))
    has = {key for key in settings if {key, PARAMETERS.get(key)} & parameters.keys()}
    if other := [key for key, value in settings.items() if value and key not in has]:
        raise ConfigError(f"{path}: {other[0]} cannot be set for this command")
    context.default_map = dict(
        _as_default(parameters, key, settings[key]) for key in has if settings[key] is not None
    )


def _as_default(parameters: Mapping[Any, Any], key: str, value: Any) -> tuple[str, Any]:
    """Return a parameter of a command and its default, for a setting and its value."""
    name = key if key in parameters else PARAMETERS.get(key, key)
    parameter = parameters[name]
    if isinstance(value, Mapping):
        return name, [f"{one}={other}" for one, other in value.items()]
    if key == "text_as":
        return name, value == "chat"
    if isinstance(value, bool) and not parameter.is_flag:
        return name, "on" if value else "off"
    is_single = not isinstance(value, list | tuple)
    return name, [value] if parameter.multiple and is_single else value
