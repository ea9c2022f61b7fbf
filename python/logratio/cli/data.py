"""`logratio data …`: what is in the data."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.options import PromptTruncation

if TYPE_CHECKING:
    from logratio.data.analysis import Analysis

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Look at preference data before anything is trained.",
)
_OUTPUT = "What is written"


class RequestError(ValueError):
    """The command's arguments cannot be followed together."""


@app.callback()
def _keep_subcommands() -> None:
    """Make `report` a word of its own, however many commands there are."""


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="Preference records, or one sealed store."),
    ],
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
    max_length: options.MaxLength = 1024,
    max_prompt_length: options.MaxPromptLength = None,
    prompt_truncation: options.Truncation = PromptTruncation.DROP,
    eos: options.Eos = True,
    demonstrations: Annotated[
        bool, typer.Option("--demonstrations", help="Read as `train --loss sft` does.")
    ] = False,
    max_bad_fraction: options.MaxBad = 1.0,
) -> None:  # fmt: skip
    """Account for every row, and say what the pairs are like.

    Rows kept, refused and left out, by cause and place; near-duplicates; lengths of chosen against
    rejected and what “the longer wins” would reach; a label-noise estimate; what padding would
    cost. Malformed rows are counted and do not stop it, as they would stop `train`.
    """
    from logratio.data import PreferenceTokenizer, TokenizationRules, build_store
    from logratio.data.analysis import analyse
    from logratio.data.analysis.sealed import analyse_store, is_store
    from logratio.progress import progress

    _check_picture(picture)
    threshold = near_duplicates or None
    if any(map(is_store, files)):
        if len(files) > 1:
            raise RequestError("a sealed store is reported alone: name one, and no other file")
        analysis = analyse_store(files[0], tokenizer=tokenizer, threshold=threshold)
        _finish(analysis, json_file, picture)
        return
    if tokenizer is None:
        raise RequestError(
            "lengths are in tokens: name the model's tokenizer with --tokenizer DIR, a folder that "
            "holds tokenizer.json"
        )
    rules = TokenizationRules(max_length, max_prompt_length, prompt_truncation.value, eos)
    reader = PreferenceTokenizer.load(tokenizer, rules)
    total = sum(file.stat().st_size for file in files if file.is_file())
    # The store lies on the disk, so that memory stays small however large the data are.
    with TemporaryDirectory(prefix="logratio-") as folder, progress("reading", total, "B") as show:
        done = 0

        def on_bytes(_rows: int, bytes_read: int, _total: int) -> None:
            nonlocal done
            show(bytes_read - done)
            done = bytes_read

        store, account = build_store(
            files,
            reader,
            Path(folder) / "report.store",
            demonstrations=demonstrations,
            max_bad_fraction=max_bad_fraction,
            progress=on_bytes,
            refused=refused,
        )
        _finish(analyse(store, account, tokenizer=reader, threshold=threshold), json_file, picture)


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
        json_file.write_text(json.dumps(analysis.to_dict(), indent=1) + "\n", "utf-8")
    if picture:
        from logratio.data.analysis.picture import draw

        draw(analysis, picture)


__all__ = ["app", "report"]
