"""Options that say what the data does not say about itself."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli.options import DATA

if TYPE_CHECKING:
    from logratio.data.formats import FormatSettings


class ListsOption(StrEnum):
    """What becomes of a ranked or scored list."""

    PAIRS = "pairs"
    BEST_WORST = "best_worst"
    GROUPS = "groups"


FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Read this format only, as `trl`, `orca`, `openai`. Default: detected.",
        rich_help_panel=DATA,
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME=KEY",
        help="The data's key for a name that formats know, as prompt=query. Repeat it, or put "
        "commas between.",
        rich_help_panel=DATA,
    ),
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="'KEY: VALUE=OUTPUT …'",
        help="What a label's values mean, as 'preference: 1=output_1 2=output_2 0=tie'; for one "
        "completion alone 'label: 1=good 0=bad'.",
        rich_help_panel=DATA,
    ),
]


ListsWanted = Annotated[
    ListsOption,
    typer.Option("--lists", help="What becomes of a ranked or scored list.", rich_help_panel=DATA),
]


def read_settings(
    format_name: str | None,
    columns: list[str] | None,
    label: str | None,
    lists: str = "pairs",
    *,
    demonstrations: bool = False,
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
        demonstrations,
        format=format_name,
        columns=mapped,
        label=label,
        lists=lists,  # type: ignore[arg-type]
    )
