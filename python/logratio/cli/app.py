"""The `logratio` command: its subcommands, and the exit code after errors and signals."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from logratio.cli import cache, data, evaluate, export, merge, precompute, report, sweep, train
from logratio.cli.usage import UsageError, usage_message
from logratio.errors import LogratioError
from logratio.progress import say
from logratio.setting_names import flags_in_messages
from logratio.synonyms import translated

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
    evaluate.evaluate,
    merge.merge,
    sweep.sweep,
    report.report,
    export.export,
    export.rank,
    export.serve,
    export.demo,
):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")


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
        arguments = spread(translated(arguments, flags))
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
        if os.environ.get("LOGRATIO_TRACEBACK") or not _is_expected(error):
            raise
        end(getattr(error, "exit_code", 2), _message(error))


def end(code: int, message: str) -> NoReturn:
    """Print the message and exit, even if standard error is closed."""
    say(f"error: {message}")
    sys.exit(code)


def flags_of(command: Any, arguments: Sequence[str]) -> set[str]:
    """Return the flags of the command that the arguments name, and of its parent commands."""
    flags = {"--help"}
    for argument in (None, *arguments):
        inner = getattr(command, "commands", {})
        if argument is None or argument in inner:
            command = inner[argument] if argument else command
            flags |= {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        elif not argument.startswith("-"):
            break
    return flags


_SPREAD = ("--data", "--eval-data", "--report-to")


def spread(arguments: Sequence[str]) -> list[str]:
    """Allow `--data a b c` for `--data a --data b --data c`, and so for others in `_SPREAD`."""
    spread_out: list[str] = []
    inside = ""
    for argument in arguments:
        is_value = argument == "-" or not argument.startswith("-")
        if inside and is_value and spread_out[-1] != inside:
            spread_out.append(inside)
        elif not is_value:
            inside = argument if argument in _SPREAD else ""
        spread_out.append(argument)
    return spread_out


def _is_expected(error: Exception) -> bool:
    """Return whether the error is meant for the user, and is not a bug in the program."""
    return isinstance(error, OSError | LogratioError) or type(error).__module__ == "logratio._rust"


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full: {error}; completed work is kept: free some space and run again"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return str(error) or type(error).__name__
