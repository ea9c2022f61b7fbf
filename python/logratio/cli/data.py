"""`logratio data …`: inspect, build, verify and report on preference data."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.options import READING, TOKENS, Reading, Tokens, takes_flags
from logratio.errors import InputError, LogratioError
from logratio.forecast import check_writable, count

if TYPE_CHECKING:
    from logratio.data.analysis.report import Analysis
    from logratio.data.formats.settings import FormatSettings


class ConflictsOption(StrEnum):
    """How to treat pairs that contradict each other."""

    KEEP = "keep"
    DROP_BOTH = "drop_both"
    MAJORITY = "majority"


@takes_flags
def build(
    files: options.Rows,
    tokenizer: Annotated[
        Path, typer.Option(metavar="DIR", help="The model's folder, with tokenizer.json.")
    ],
    output: Annotated[Path, typer.Option(help="The store to write, for example `pairs.store`.")],
    refused: Annotated[
        Path | None, typer.Option(help="File for refused rows. Default: next to the store.")
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate/--keep-duplicates", help="Of rows with the same tokens, "
                           "keep one or all.")
    ] = True,
    conflicts: Annotated[
        ConflictsOption, typer.Option(help="If one row prefers A to B and another B to A: keep "
                                      "both, drop both, or keep the more frequent preference.")
    ] = ConflictsOption.KEEP,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again instead of resuming an interrupted run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing store when the new one is "
                           "complete.")
    ] = False,
    demonstrations: options.Demonstrations = False,
    reading: Reading = READING,
) -> None:  # fmt: skip
    """Tokenize data once into a store, which `train --data pairs.store` opens without delay.

    May be interrupted at any moment (Ctrl-C, kill -9, a power failure): run it again to resume.
    Memory use does not grow with the size of the data.
    """
    from logratio.data.store.build import build_store
    from logratio.data.store.turn_weights import weight_counts
    from logratio.data.tokenization.tokenizer import PreferenceTokenizer
    from logratio.one_process import refuse_multiple_processes
    from logratio.progress import reading_progress

    refuse_multiple_processes("data build")
    _make_room(output, overwrite=overwrite)
    with _report_saved_progress(output), reading_progress() as progress:
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
    if weights := weight_counts(store):
        typer.echo(str(weights))
    typer.echo(f"{count(len(store), 'group')}, {count(store.tokens, 'token')}: {output}")


def _make_room(output: Path, *, overwrite: bool) -> None:
    """Make the folder of a new store, unless it may not be written."""
    if output.exists() and not overwrite:
        raise InputError(
            f"{output}: file exists; replace it with --overwrite, or choose another --output"
        )
    check_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _report_saved_progress(output: Path) -> Iterator[None]:
    """After Ctrl-C, print where the next run can resume."""
    from logratio.data.store.build import is_saved

    try:
        yield
    except KeyboardInterrupt:
        again = "run the same command to resume from the last save, at most ten seconds ago"
        typer.echo(f"stopped: {again if is_saved(output) else 'nothing was saved yet'}", err=True)
        raise


def verify(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE…", help="Sealed stores.")],
) -> None:
    """Check every byte of stores against their checksums. Exits with 1 if one is damaged."""
    from logratio.data.store.load import CorruptStoreError, verified

    damaged = False
    for path in stores:
        try:
            store = verified(path)
        except CorruptStoreError as error:
            damaged = True
            typer.echo(f"not sound: {error}")
        else:
            typer.echo(f"{path}: sound, {count(len(store), 'group')}, digest {store.digest}")
    if damaged:
        raise typer.Exit(1)


_OUTPUT = "Output"
_ALL_MAY_BE_BAD = Reading(max_bad_fraction=1.0)


class RequestError(LogratioError, ValueError):
    """The command's arguments are incomplete or contradict each other."""


@takes_flags
def report(
    files: options.Files,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The model's folder, with the tokenizer.json that "
                     "training will use. For a store, its tokenizer, to show tokens as text."),
    ] = None,
    json_file: options.JsonFile = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Plot lengths, length bias and padding to this .svg, .png or .pdf file. "
                     "Needs matplotlib: pip install 'logratio[plots]'.", rich_help_panel=_OUTPUT),
    ] = None,
    refused: Annotated[
        Path | None,
        typer.Option(help="Write refused rows to this file: JSON lines of place, code, reason and "
                     "row.",
                     rich_help_panel=_OUTPUT),
    ] = None,
    near_duplicates: Annotated[
        float,
        typer.Option(min=0, max=1, help="List groups whose sets of 5-token windows have at least "
                     "this Jaccard index. 0 disables the search."),
    ] = 0.8,
    demonstrations: options.Demonstrations = False,
    reading: Reading = _ALL_MAY_BE_BAD,
) -> None:  # fmt: skip
    """Report on preference data: rows kept and refused, near-duplicates, length bias, label noise.

    Counts rows kept, refused and left out, by cause and place. Compares the lengths of chosen and
    rejected, with the accuracy of “the longer wins”; estimates label noise and the cost of padding.
    Malformed rows are counted; unlike in `train`, they do not stop the command.
    """
    from logratio.data.analysis.plots import check_picture
    from logratio.data.analysis.report import analyse_store
    from logratio.data.store.load import is_store

    if picture:
        check_picture(picture)
    for path in filter(None, (json_file, picture)):
        if not options.is_stdout(path):
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
    """Read files into a temporary store on disk, which keeps memory small, and analyse it.

    Raises:
        RequestError: No tokenizer is given.
    """
    from logratio.data.analysis.report import analyse
    from logratio.data.store.build import build_store
    from logratio.data.tokenization.tokenizer import PreferenceTokenizer
    from logratio.progress import reading_progress

    if tokenizer is None:
        raise RequestError(
            "lengths are in tokens: give the model's tokenizer with --tokenizer DIR, a folder with "
            "tokenizer.json"
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
    """Print the report, and write the requested files."""
    to_stdout = options.is_stdout(json_file)
    if not to_stdout:
        typer.echo(analysis.to_text())
    if json_file:
        options.write_json(json_file, analysis.to_dict())
    if picture:
        from logratio.data.analysis.plots import draw

        draw(analysis, picture)
        typer.echo(f"picture: {picture}", err=to_stdout)


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Inspect preference data, report on it, and build and verify stores.",
)
_STYLES = {"": "", "title": "bold", "counts": "black on green", "fault": "red", "dim": "dim"}


@app.callback()
def data() -> None:
    """Inspect preference data, report on it, and build and verify stores."""


@takes_flags
def inspect(
    files: options.Rows,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A model's folder: show records as its tokens."),
    ] = None,
    reading: Tokens = TOKENS,
    first: Annotated[int, typer.Option(min=1, help="Number of rows to read.")] = 100,
) -> None:
    """Detect the format of each file, explain why, and show a record with loss tokens in colour.

    Reads only the first rows. Without colour, the tokens of the loss are between ‹ and ›. Exits
    with 1 if a file, or one of the rows read, has no known format.
    """
    from rich.console import Console
    from rich.text import Text

    from logratio.data.inspection import inspect as look
    from logratio.data.tokenization.tokenizer import PreferenceTokenizer

    if tokenizer is None and reading.rules != TOKENS.rules:
        raise InputError(
            "--tokenizer is missing: without it, length limits and templates have no effect"
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
