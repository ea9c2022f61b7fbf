"""The command `logratio`: its commands, and how errors and signals end it."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from logratio.cli import cache, data, evaluation, precompute, scoring, training
from logratio.errors import LogratioError

app = typer.Typer(
    name="logratio",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Preference optimisation from records to a served ranking.\n\n"
    "One number runs through everything: the log-ratio log π(y|x) − log π_ref(y|x). "
    "`precompute` caches the reference's half, `train` moves the policy's half, and β times it is "
    "the reward that `export`, `rank` and `serve` carry to production. Start with `logratio demo`.",
)
BASE = {"torch", "transformers", "peft", "safetensors", "tensorboardX", "pyarrow"}
"""What a server leaves out: it installs the wheel alone."""

for command in (
    precompute.precompute,
    training.train,
    evaluation.evaluate,
    scoring.export,
    scoring.rank,
    scoring.serve,
    scoring.demo,
):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: bool = typer.Option(False, "--version", help="Print the version and end."),
) -> None:
    """Answer `logratio --version`."""
    if show:
        from logratio import __version__

        typer.echo(f"logratio {__version__}")
        raise typer.Exit
    assert context is not None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process: 0, 2 for a wrong request, 128 + n for signal n."""
    arguments = spread(sys.argv[1:] if arguments is None else arguments)
    try:
        app(args=arguments, standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in BASE:
            raise
        sys.stderr.write(f"error: this command needs {error.name}: pip install logratio\n")
        sys.exit(2)
    except Exception as error:
        if os.environ.get("LOGRATIO_TRACEBACK") or not _is_told(error):
            raise
        sys.stderr.write(f"error: {_sentence(error)}\n")
        sys.exit(getattr(error, "exit_code", 2))
    raise AssertionError("typer ends the process")


def spread(arguments: Sequence[str]) -> list[str]:
    """Allow `--data a b c` for `--data a --data b --data c`."""
    spread_out: list[str] = []
    inside = False
    for argument in arguments:
        is_value = argument == "-" or not argument.startswith("-")
        if inside and is_value and spread_out[-1] != "--data":
            spread_out.append("--data")
        elif not is_value:
            inside = argument == "--data"
        spread_out.append(argument)
    return spread_out


def _is_told(error: Exception) -> bool:
    """Tell an error that speaks to the user from a fault of the program."""
    return isinstance(error, OSError | LogratioError) or type(error).__module__ == "logratio._rust"


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == 28:
        return f"the disk is full: {error}; what was written before is kept, make room and go on"
    return str(error) or type(error).__name__
