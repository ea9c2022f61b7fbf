"""Options that several commands share, and how a parameter stands for many flags."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from logratio.data.formats.settings import FormatSettings
    from logratio.data.tokenization.groups import TextAs, TokenizationRules

Command = Callable[..., None]


def takes_flags(command: Command) -> Command:
    """Spread a command's dataclasses: every field is a flag of its own, in the parameter's place.

    The command has a default for such a parameter, whose fields are the flags' defaults.
    """
    own = inspect.signature(command).parameters.values()
    groups: dict[str, type[Any]] = {p.name: type(p.default) for p in own if is_dataclass(p.default)}

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    spread = [flag for parameter in own for flag in _flags(parameter)]
    called.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    called.__annotations__ = {flag.name: flag.annotation for flag in spread}
    return called


def _flags(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return a parameter, or those of the dataclass that it stands for."""
    given = parameter.default
    if not is_dataclass(given):
        return [parameter]
    hints = get_type_hints(type(given), include_extras=True)
    return [
        parameter.replace(
            name=field.name, default=getattr(given, field.name), annotation=hints[field.name]
        )
        for field in fields(given)
    ]


@dataclass(frozen=True)
class Settings:
    """Flags that are called as the fields of a command's config that they fill."""

    def settings(self) -> dict[str, Any]:
        """Return them as the config takes them: words, and tuples of what was repeated."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    return (tuple(value) or None) if isinstance(value, list) else value


DATA, MACHINE = "Data", "Machine"


class ReadMode(StrEnum):
    """How sealed shards of a cache are read."""

    MAP = "map"
    PREAD = "pread"


class Precision(StrEnum):
    """What is computed in; weights are float32 in the first two."""

    FP32 = "fp32"
    BF16 = "bf16"
    BF16_WEIGHTS = "bf16-weights"


Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE…",
        help="Preference data: files, folders, - for standard input; or one sealed store.",
    ),
]
Rows = Annotated[
    list[Path],
    typer.Argument(metavar="FILE…", help="Preference data: files, folders, - for standard input."),
]
Demonstrations = Annotated[
    bool,
    typer.Option("--demonstrations", help="Read as `train --loss sft` does.", rich_help_panel=DATA),
]
Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        metavar="FILE…",
        help="Preference data: JSON lines or arrays, CSV, Parquet, Arrow, plain, .gz or .zst; "
        "folders; - for standard input; or one sealed store. `logratio data inspect` says what is "
        "recognised. Several may follow.",
        rich_help_panel=DATA,
    ),
]
ReadModeOption = Annotated[
    ReadMode,
    typer.Option(help="How the cache is read. pread is for network file systems: a file that is "
                 "cut meanwhile is then an error, not a crash.", rich_help_panel=MACHINE),
]  # fmt: skip
PrecisionOption = Annotated[
    Precision | None,
    typer.Option("--precision", help="bf16 is autocast over float32 weights; bf16-weights rounds "
                 "the weights too. Default: bf16 on a GPU, fp32 on a CPU.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
ShareBeginnings = Annotated[
    bool,
    typer.Option(
        "--share-beginnings",
        help="Compute what several groups begin with alike once: a system prompt, earlier turns of "
        "a conversation. `data report` says what it saves. No result changes beyond rounding.",
        rich_help_panel=MACHINE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what it will need, and stop there."),
]


LIMITS = "How records become tokens"


class Lists(StrEnum):
    """What becomes of a ranked or scored list."""

    PAIRS = "pairs"
    BEST_WORST = "best_worst"
    GROUPS = "groups"


class Strings(StrEnum):
    """What a string is that spells a list of messages."""

    MESSAGES = "messages"
    TEXT = "text"


class PromptTruncation(StrEnum):
    """What becomes of a prompt above the limit."""

    DROP = "drop"
    ERROR = "error"
    KEEP_START = "keep_start"
    KEEP_END = "keep_end"


@dataclass(frozen=True)
class Formats:
    """What the data does not say about itself."""

    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Read this format only, as `trl`, `orca`, `openai`. Default: detected.",
            rich_help_panel=DATA,
        ),
    ] = None
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns",
            metavar="NAME=KEY",
            help="The data's key for a name that formats "
            "know, as prompt=query, or a path to it, as prompt=info.post or chosen=answers.0.text. "
            "Repeat it, or put commas between.",
            rich_help_panel=DATA,
        ),
    ] = None
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            metavar="'KEY: VALUE=OUTPUT …'",
            help="What a label's values mean, "
            "as 'preference: 1=output_1 2=output_2 0=tie'. Ranges: 'score: <0=a >0=b 0=tie', "
            "'score: 1..3=a 4=tie 5..7=b'; one-hot columns: 'winner_*: a=output_a b=output_b'; "
            "for one completion alone 'label: 1=good 0=bad'.",
            rich_help_panel=DATA,
        ),
    ] = None
    lists: Annotated[
        Lists, typer.Option("--lists", help="What becomes of a ranked or scored list.",
                            rich_help_panel=DATA),
    ] = Lists.PAIRS  # fmt: skip
    strings: Annotated[
        Strings | None,
        typer.Option("--strings", help="What a string is that spells a list of messages, as JSON "
                     "or Python's repr. Default: a chat where all parts of a row are such strings, "
                     "text where none is.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="The split to read of folders that hold "
                     "several, as train. Default: the only one.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    score: Annotated[
        str | None,
        typer.Option("--score", metavar="NAME", help="The score that ranks a list of answers, "
                     "where there are several: a key, with dots into objects.",
                     rich_help_panel=DATA),
    ] = None  # fmt: skip

    encoding: Annotated[
        str | None,
        typer.Option("--encoding", metavar="NAME", help="Of files of text, as cp1252 or utf-16. "
                     "Default: UTF-8.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    rows: Annotated[
        str | None,
        typer.Option("--rows", metavar="LAYOUT", help="What every row goes through first: argilla, "
                     "label-studio, math-shepherd, oasst, prm800k, or a Python function of yours, "
                     "MODULE:FUNCTION, from a dict to a dict, a list of them, or None to leave the "
                     "row out.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    group_by: Annotated[
        str | None,
        typer.Option("--group-by", metavar="KEY", help="Neighbours that say the same under a key, "
                     "as prompt, become one row, with a list under every other key.",
                     rich_help_panel=DATA),
    ] = None  # fmt: skip

    def settings(self, *, demonstrations: bool = False) -> "FormatSettings":
        """Read them.

        Raises:
            FormatSettingsError: They cannot be followed.
        """
        from logratio.data.formats.settings import FormatSettings

        return FormatSettings(
            demonstrations,
            format=self.format_name,
            columns=self._mapped(),
            label=self.label,
            lists=self.lists.value,
            strings=self.strings.value if self.strings else None,
            score=self.score,
            split=self.split,
            encoding=self.encoding,
            rows=self.rows,
            group_by=self.group_by,
        )

    def _mapped(self) -> dict[str, str]:
        from logratio.data.formats.labels import FormatSettingsError

        mapped = {}
        for word in (word for words in self.columns or [] for word in words.split(",")):
            name, equals, key = word.partition("=")
            if not (name and equals and key):
                raise FormatSettingsError(f"--columns {word!r}: write it as prompt=query")
            mapped[name] = key
        return mapped


@dataclass(frozen=True)
class Tokens(Formats):
    """How records are read and become tokens."""

    max_length: Annotated[
        int,
        typer.Option(
            help="Tokens of prompt + completion; completions are cut, and counted.",
            rich_help_panel=LIMITS,
        ),
    ] = 1024
    max_prompt_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt. Default: max-length − 1.", rich_help_panel=LIMITS),
    ] = None
    prompt_truncation: Annotated[
        PromptTruncation,
        typer.Option(
            help="A prompt above the limit: drop the record (counted), stop with an "
            "error, or keep its start or end.",
            rich_help_panel=LIMITS,
        ),
    ] = PromptTruncation.DROP
    eos: Annotated[
        bool,
        typer.Option(
            "--eos/--no-eos",
            help="End text completions with EOS. --no-eos when "
            "completions were cut short. A chat template decides by itself.",
            rich_help_panel=LIMITS,
        ),
    ] = True
    split_special_tokens: Annotated[
        bool,
        typer.Option(
            "--split-special-tokens",
            help="Read special tokens that are spelled in plain text as text.",
            rich_help_panel=LIMITS,
        ),
    ] = False
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--text",
            help="Where the tokenizer has a chat template: wrap plain text as the turns of user "
            "and assistant, or read it as it stands. Default: as it stands, with a warning.",
            rich_help_panel=LIMITS,
            show_default=False,
        ),
    ] = None
    date: Annotated[
        str | None,
        typer.Option(
            metavar="2026-11-29",
            help="The date that the chat template writes, where it has a clock. Default: that of "
            "the store, the run, the policy or the cache; else today's, which is recorded.",
            rich_help_panel=LIMITS,
        ),
    ] = None

    @property
    def rules(self) -> "TokenizationRules":
        """How records become tokens."""
        from logratio.data.tokenization.groups import TokenizationRules

        return TokenizationRules(
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            prompt_truncation=self.prompt_truncation.value,
            append_eos=self.eos,
            split_special_tokens=self.split_special_tokens,
            text_as=read_text_as(self.chat),
            date=self.date,
        )


@dataclass(frozen=True)
class Reading(Tokens):
    """How records are read, how many may be malformed, and how they become tokens."""

    max_bad_fraction: Annotated[
        float,
        typer.Option("--max-bad-fraction", help="Share of malformed rows to go on with; each is "
                     "counted and named. 0 stops at any.", rich_help_panel=DATA),
    ] = 0.0  # fmt: skip


def read_text_as(chat: bool | None) -> "TextAs | None":
    """Read --chat and --text."""
    return None if chat is None else "chat" if chat else "text"


FORMATS, TOKENS, READING = Formats(), Tokens(), Reading()
"""The defaults."""
