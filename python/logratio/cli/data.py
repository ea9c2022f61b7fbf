"""`logratio data …`: inspect, build, verify and report on preference data."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.options import READING, TOKENS, Reading, Tokens, takes_flags
from logratio.durable import write_whole
from logratio.errors import InputError, LogratioError
from logratio.forecast import check_writable

if TYPE_CHECKING:
    from logratio.data.analysis.report import Analysis
    from logratio.data.formats.settings import FormatSettings


class ConflictsOption(StrEnum):
    """What becomes of pairs that say the opposite of each other."""

    KEEP = "keep"
    DROP_BOTH = "drop_both"
    MAJORITY = "majority"


@takes_flags
def build(
    files: options.Rows,
    tokenizer: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with tokenizer.json: the model's.")
    ],
    output: Annotated[Path, typer.Option(help="The store to write, as `pairs.store`.")],
    refused: Annotated[
        Path | None, typer.Option(help="Write refused rows there. Default: beside the store.")
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate/--keep-duplicates", help="Rows of the same tokens: keep "
                           "one, or all.")
    ] = True,
    conflicts: Annotated[
        ConflictsOption, typer.Option(help="A over B here and B over A there: keep all, drop both, "
                                      "or keep what was said more often.")
    ] = ConflictsOption.KEEP,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, even if an earlier run was cut off.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store that is there, once the new one is "
                           "whole.")
    ] = False,
    demonstrations: options.Demonstrations = False,
    reading: Reading = READING,
) -> None:  # fmt: skip
    """Tokenize once, for any number of runs: `train --data pairs.store` opens it in no time.

    Cut it off at any moment (Ctrl-C, kill -9, a loss of power) and run it again: it goes on where
    it was. Memory stays bounded whatever the size of the data.
    """
    from logratio.data.store.build import build_store
    from logratio.data.tokenization.tokenizer import PreferenceTokenizer
    from logratio.forecast import check_writable
    from logratio.progress import reading_progress

    if output.exists() and not overwrite:
        raise InputError(
            f"{output}: there is a file of this name; replace it with --overwrite, or name another"
        )
    check_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _told_what_is_kept(output), reading_progress() as progress:
        store, report = build_store(
            files,
            PreferenceTokenizer.load(tokenizer, reading.rules),
            output,
            formats=reading.settings(demonstrations=demonstrations),
            max_bad_fraction=reading.max_bad_fraction,
            deduplicate=deduplicate,
            conflicts=conflicts.value,
            resume=not fresh,
            progress=progress,
            refused=refused or output.with_name(f"{output.name}.refused.jsonl"),
            tell=lambda sentence: typer.echo(sentence, err=True),
        )
    typer.echo(report.to_text())
    typer.echo(f"{len(store):,} groups, {store.tokens:,} tokens: {output}")


@contextmanager
def _told_what_is_kept(output: Path) -> Iterator[None]:
    """Say after Ctrl-C what the next run can go on from."""
    from logratio.data.store.build import is_saved

    try:
        yield
    except KeyboardInterrupt:
        again = "the same command goes on where the last save was, at most ten seconds back"
        typer.echo(f"stopped: {again if is_saved(output) else 'nothing was saved yet'}", err=True)
        raise


def verify(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE…", help="Sealed stores.")],
) -> None:
    """Read every byte of stores and compare it with their checksums. Ends with 1 at damage."""
    from logratio.data.store.load import CorruptStoreError, verified

    damaged = False
    for path in stores:
        try:
            store = verified(path)
        except CorruptStoreError as error:
            damaged = True
            typer.echo(f"not sound: {error}")
        else:
            typer.echo(f"{path}: sound, {len(store):,} groups, digest {store.digest}")
    if damaged:
        raise typer.Exit(1)


_OUTPUT = "What is written"
_ALL_MAY_BE_BAD = Reading(max_bad_fraction=1.0)


class RequestError(LogratioError, ValueError):
    """The command's arguments cannot be followed together."""


@takes_flags
def report(
    files: options.Files,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with the tokenizer.json that training will use: "
                     "the model's. For a store: the one that made it, to name its tokens."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything there.", rich_help_panel=_OUTPUT),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw lengths, length bias and padding there: .svg, .png or .pdf. Needs "
                     "matplotlib, from the extra plots.", rich_help_panel=_OUTPUT),
    ] = None,
    refused: Annotated[
        Path | None,
        typer.Option(help="Write refused rows there: JSON lines of place, code, reason and row.",
                     rich_help_panel=_OUTPUT),
    ] = None,
    near_duplicates: Annotated[
        float,
        typer.Option(min=0, max=1, help="Name groups whose windows of 5 tokens have this Jaccard "
                     "index. 0: do not look."),
    ] = 0.8,
    demonstrations: options.Demonstrations = False,
    reading: Reading = _ALL_MAY_BE_BAD,
) -> None:  # fmt: skip
    """Account for every row, and say what the pairs are like.

    Rows kept, refused and left out, by cause and place; near-duplicates; lengths of chosen against
    rejected and what “the longer wins” would reach; a label-noise estimate; what padding would
    cost. Malformed rows are counted and do not stop it, as they would stop `train`.
    """
    from logratio.data.analysis.plots import check_picture
    from logratio.data.analysis.report import analyse_store
    from logratio.data.store.load import is_store

    if picture:
        check_picture(picture)
    for path in filter(None, (json_file, picture)):
        check_writable(path.parent)
    threshold = near_duplicates or None
    if is_store(files):
        analysis = analyse_store(files[0], tokenizer=tokenizer, threshold=threshold)
    else:
        formats = reading.settings(demonstrations=demonstrations)
        analysis = _analysed(files, tokenizer, reading, formats, threshold, refused)
    _finish(analysis, json_file, picture)


def _analysed(
    files: list[Path],
    tokenizer: Path | None,
    reading: Reading,
    formats: "FormatSettings",
    threshold: float | None,
    refused: Path | None,
) -> "Analysis":
    """Read files into a store on the disk, so that memory stays small, and analyse it.

    Raises:
        RequestError: no tokenizer is named.
    """
    from logratio.data.analysis.report import analyse
    from logratio.data.store.build import build_store
    from logratio.data.tokenization.tokenizer import PreferenceTokenizer
    from logratio.progress import reading_progress

    if tokenizer is None:
        raise RequestError(
            "lengths are in tokens: name the model's tokenizer with --tokenizer DIR, a folder that "
            "holds tokenizer.json"
        )
    reader = PreferenceTokenizer.load(tokenizer, reading.rules)
    with TemporaryDirectory(prefix="logratio-") as folder, reading_progress() as tell:
        store, account = build_store(
            files,
            reader,
            Path(folder) / "report.store",
            formats=formats,
            max_bad_fraction=reading.max_bad_fraction,
            progress=tell,
            refused=refused,
        )
        return analyse(store, account, tokenizer=reader, threshold=threshold)


def _finish(analysis: "Analysis", json_file: Path | None, picture: Path | None) -> None:
    """Print the report and write what was asked for."""
    typer.echo(analysis.to_text())
    if json_file:
        write_whole(json_file, json.dumps(analysis.to_dict(), indent=1) + "\n")
    if picture:
        from logratio.data.analysis.plots import draw

        draw(analysis, picture)


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
    from logratio.data.tokenization.tokenizer import PreferenceTokenizer

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


for command in (inspect, report, build, verify):
    app.command()(command)
