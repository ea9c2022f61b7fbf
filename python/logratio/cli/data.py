"""`logratio data …`: what data is, before anything is trained on it."""

from pathlib import Path
from typing import Annotated

import typer

from logratio.cli import data_report, data_store, options
from logratio.cli.flags import takes_flags
from logratio.cli.reading import TOKENS, Tokens
from logratio.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at preference data, account for it, and make a store of it.",
)
_STYLES = {"": "", "title": "bold", "counts": "black on green", "fault": "red", "dim": "dim"}


@app.callback()
def data() -> None:
    """Look at preference data, account for it, and make a store of it."""


@takes_flags
def inspect(
    files: options.Rows,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A model's folder: shows the tokens that it will read."),
    ] = None,
    reading: Tokens = TOKENS,
    first: Annotated[int, typer.Option(min=1, help="Rows to look at, from the first.")] = 100,
) -> None:
    """Say of each file what it is and why, and show a record with what counts in colour.

    Reads the first rows only. Without colour, what counts stands between ‹ and ›. Ends with 1
    where a file, or a row of those looked at, is of no known format.
    """
    from rich.console import Console
    from rich.text import Text

    from logratio.data.inspection import inspect as look
    from logratio.data.tokenization import PreferenceTokenizer

    if tokenizer is None and reading.rules != TOKENS.rules:
        raise InputError(
            "--tokenizer is missing: without it no limit and no template has an effect"
        )
    loaded = PreferenceTokenizer.load(tokenizer, reading.rules) if tokenizer else None
    found = look(files, reading.settings(), loaded, first)
    console = Console(highlight=False, soft_wrap=True)
    if console.color_system is None:
        typer.echo(found.to_text(), nl=False)
    else:
        segments = [(segment.text, _STYLES[segment.style]) for segment in found.segments()]
        console.print(Text.assemble(*segments), end="")
    if not found.is_known:
        raise typer.Exit(1)


for command in (inspect, data_report.report, data_store.build, data_store.verify):
    app.command()(command)
