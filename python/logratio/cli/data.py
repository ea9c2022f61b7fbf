"""`logratio data …`: what data is, before anything is trained on it."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from logratio.data.formats import FormatSettings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at preference data: what it is, and what will be made of it.",
)
_STYLES = {"": "", "title": "bold", "counts": "black on green", "fault": "red", "dim": "dim"}


class ListsOption(StrEnum):
    """What becomes of a ranked or scored list."""

    PAIRS = "pairs"
    BEST_WORST = "best_worst"
    GROUPS = "groups"


Files = Annotated[
    list[Path], typer.Argument(metavar="FILE…", help="Preference data: JSONL, also .gz.")
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="Read this format only, as `trl`, `orca`, `openai`."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME=KEY",
        help="The data's key for a name that formats know, as prompt=query. Repeat it, or put "
        "commas between.",
    ),
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="'KEY: VALUE=OUTPUT …'",
        help="What a label's values mean, as 'preference: 1=output_1 2=output_2 0=tie'; for one "
        "completion alone 'label: 1=good 0=bad'.",
    ),
]


def read_settings(
    format_name: str | None, columns: list[str] | None, label: str | None, lists: str
) -> "FormatSettings":
    """Read what flags say about the data.

    Raises:
        FormatSettingsError: It cannot be followed.
    """
    from logratio.data.formats import FormatSettings, FormatSettingsError

    mapped = {}
    for word in (word for words in columns or [] for word in words.split(",")):
        name, equals, key = word.partition("=")
        if not (name and equals and key):
            raise FormatSettingsError(f"--columns {word!r}: write it as prompt=query")
        mapped[name] = key
    return FormatSettings(
        format=format_name,
        columns=mapped,
        label=label,
        lists=lists,  # type: ignore[arg-type]
    )


@app.callback()
def data() -> None:
    """Look at preference data: what it is, and what will be made of it."""


@app.command()
def inspect(
    files: Files,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A model's folder: shows the tokens that it will read."),
    ] = None,
    format_name: FormatOption = None,
    columns: Columns = None,
    label: LabelOption = None,
    lists: Annotated[
        ListsOption, typer.Option(help="What becomes of a ranked list.")
    ] = ListsOption.PAIRS,
    rows: Annotated[int, typer.Option(min=1, help="Rows to look at, from the first.")] = 100,
) -> None:
    """Say of each file what it is and why, and show a record with what counts in colour.

    Reads the first rows only. Without colour, what counts stands between ‹ and ›. Ends with 1
    where a file, or a row of those looked at, is of no known format.
    """
    from rich.console import Console
    from rich.text import Text

    from logratio.data.inspection import inspect as look
    from logratio.data.tokenization import PreferenceTokenizer

    loaded = PreferenceTokenizer.load(tokenizer) if tokenizer else None
    found = look(files, read_settings(format_name, columns, label, lists.value), loaded, rows)
    console = Console(highlight=False, soft_wrap=True)
    if console.color_system is None:
        typer.echo(found.to_text(), nl=False)
    else:
        segments = [(segment.text, _STYLES[segment.style]) for segment in found.segments()]
        console.print(Text.assemble(*segments), end="")
    if not found.is_known:
        raise typer.Exit(1)
