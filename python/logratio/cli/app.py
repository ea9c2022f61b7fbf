"""The `logratio` command: its subcommands, and the exit code after errors and signals."""

import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import typer

from logratio.cli import (
    bundle,
    cache,
    data,
    evaluate,
    export,
    merge,
    methods,
    precompute,
    report,
    serve,
    sweep,
    train,
)
from logratio.cli.usage import UsageError, usage_message
from logratio.errors import LogratioError
from logratio.progress import say
from logratio.setting_names import flags_in_messages
from logratio.synonyms import translated
from logratio.validation import split_list

app = typer.Typer(
    name="logratio",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Preference optimisation (the DPO family), from raw data to a served reranker.\n\n"
    "All commands work with the log-ratio log π(y|x) − log π_ref(y|x). `precompute` caches the "
    "reference log-probs, `train` optimises the policy, and `export`, `rank` and `serve` score "
    "completions with the implicit reward β · log-ratio. Start with `logratio demo`.\n\n"
    "Exit codes: 0, success; 1, a check (`inspect`, `verify`) found a problem; 2, the request "
    "cannot be carried out, and the message gives the reason; 128 + n after signal n (130 for "
    "Ctrl-C).",
)
BASE = {"torch", "transformers", "peft", "safetensors", "tensorboardX", "pyarrow"}
"""Packages that a serving machine may lack: it installs only the wheel."""

for command in (
    precompute.precompute,
    train.train,
    methods.methods,
    evaluate.evaluate,
    merge.merge,
    sweep.sweep,
    report.report,
    export.export,
    export.rank,
    serve.serve,
    export.demo,
):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")
app.add_typer(bundle.app, name="bundle")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Answer `logratio --version`."""
    if show:
        from logratio import __version__

        typer.echo(f"logratio {__version__}")
        raise typer.Exit
    assert context is not None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit the process.

    Exit codes: 0, success; 1, a check found a problem (`inspect`, `verify`); 2, the request cannot
    be carried out, with a message; 128 + n after signal n, so 130 after Ctrl-C. A bug in the
    program ends with a traceback and code 1.

    Args:
        arguments: The command line without the program's name; `sys.argv[1:]` by default.
    """
    with flags_in_messages():
        _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> NoReturn:
    command = typer.main.get_command(app)
    flags = flags_of(command, arguments)
    try:
        arguments = spread(translated(arguments, flags), lists_of(command, arguments))
        sys.exit(command.main(args=arguments, prog_name="logratio", standalone_mode=False))
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in BASE:
            raise
        end(2, f"this command needs {error.name}: pip install logratio")
    except UsageError as error:
        if not str(error):  # no arguments: the help is printed already
            sys.exit(2)
        end(2, usage_message(error, arguments, flags))
    except Exception as error:
        if getattr(error, "is_printed", False):  # by another process of the run
            sys.exit(getattr(error, "exit_code", 2))
        if os.environ.get("LOGRATIO_TRACEBACK") or not _is_expected(error):
            raise
        end(getattr(error, "exit_code", 2), _message(error))


def end(code: int, message: str) -> NoReturn:
    """Print the message and exit, even if standard error is closed."""
    say(f"error: {message}", urgent=True)
    sys.exit(code)


def flags_of(command: Any, arguments: Sequence[str]) -> set[str]:
    """Return the flags of the command that the arguments name, and of its parent commands."""
    flags = {"--help"}
    for called in _called(command, arguments):
        flags |= {option for p in called.params for option in (*p.opts, *p.secondary_opts)}
    return flags


def _called(command: Any, arguments: Sequence[str]) -> Iterator[Any]:
    """Yield the command, and the subcommands that the arguments name."""
    yield command
    for argument in arguments:
        inner = getattr(command, "commands", {})
        if argument in inner:
            command = inner[argument]
            yield command
        elif not argument.startswith("-"):
            break


def lists_of(command: Any, arguments: Sequence[str]) -> dict[str, bool]:
    """Return the flags of lists of the command that the arguments name.

    Returns:
        Each flag, and whether a comma separates its values, as in no name of a file. Empty if the
        command has arguments without a flag, which could be taken for values.
    """
    *_, called = _called(command, arguments)
    if any(parameter.param_type_name == "argument" for parameter in called.params):
        return {}
    lists = [one for one in called.params if getattr(one, "multiple", False)]
    return {flag: flag not in _FILES for one in lists for flag in one.opts}


_FILES = ("--data", "--eval-data", "--bundle")
"""Flags of lists of files."""


def spread(arguments: Sequence[str], lists: Mapping[str, bool]) -> list[str]:
    """Repeat the flags of lists: `--beta 0.1 0.5` and `--beta 0.1,0.5` for two `--beta`.

    Args:
        arguments: The command line.
        lists: Flags of lists, and whether a comma separates their values.
    """
    spread_out: list[str] = []
    inside = ""
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and lists.get(flag):
            spread_out += [f"{flag}={one}" for one in split_list(value) or [value]]
            inside = ""
            continue
        is_value = argument == "-" or not argument.startswith("-")
        if not is_value:
            inside = argument if argument in lists else ""
            spread_out.append(argument)
            continue
        values = split_list(argument) if inside and lists[inside] else [argument]
        for one in values or [argument]:
            spread_out += [inside] if inside and spread_out[-1] != inside else []
            spread_out.append(one)
    return spread_out


def _is_expected(error: Exception) -> bool:
    """Return whether the error is meant for the user, and is not a bug in the program."""
    return isinstance(error, OSError | LogratioError) or type(error).__module__ == "logratio._rust"


def _message(error: Exception) -> str:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return _sentence(error) + notes


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error}; completed work is kept: free some space and run again"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return str(error) or type(error).__name__
