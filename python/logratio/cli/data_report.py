"""`logratio data report`: every row accounted for, and what the pairs are like."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.flags import takes_flags
from logratio.cli.reading import Reading
from logratio.durable import write_whole
from logratio.errors import LogratioError
from logratio.forecast import check_writable

if TYPE_CHECKING:
    from logratio.data.analysis import Analysis
    from logratio.data.formats import FormatSettings

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
        typer.Option(help="Draw lengths, length bias and padding: .svg, or .png with matplotlib.",
                     rich_help_panel=_OUTPUT),
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
    from logratio.data import is_store
    from logratio.data.analysis.sealed import analyse_store

    _check_picture(picture)
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
    from logratio.data import PreferenceTokenizer, build_store
    from logratio.data.analysis import analyse
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


def _check_picture(picture: Path | None) -> None:
    """Refuse a picture of another kind before anything long."""
    if picture and picture.suffix not in (".svg", ".png"):
        raise RequestError(f"{picture}: a picture is .svg or .png")
    if picture and picture.suffix == ".png":
        from logratio.extras import require

        require("matplotlib.figure", "demo")


def _finish(analysis: "Analysis", json_file: Path | None, picture: Path | None) -> None:
    """Print the report and write what was asked for."""
    typer.echo(analysis.to_text())
    if json_file:
        write_whole(json_file, json.dumps(analysis.to_dict(), indent=1) + "\n")
    if picture:
        from logratio.data.analysis.picture import draw

        draw(analysis, picture)


__all__ = ["report"]
