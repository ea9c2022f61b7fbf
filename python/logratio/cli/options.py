"""Options shared by several commands, and dataclasses whose fields become flags."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from logratio.durable import write_atomic

if TYPE_CHECKING:
    from logratio.data.formats.settings import FormatSettings
    from logratio.data.tokenization.groups import TextAs, TokenizationRules

Command = Callable[..., None]


def takes_flags(command: Command, *, without: frozenset[str] = frozenset()) -> Command:
    """Replace a command's dataclass parameters by one flag per field.

    Such a parameter must have a default; the fields of the default are the flags' defaults.

    Args:
        command: The command.
        without: Fields that become no flag and keep their defaults. The same holds for fields with
            the name of another parameter of the command.
    """
    parameters = inspect.signature(command).parameters.values()
    without |= {p.name for p in parameters if not is_dataclass(p.default)}
    groups: dict[str, type[Any]] = {
        p.name: type(p.default) for p in parameters if is_dataclass(p.default)
    }

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            names = [field.name for field in fields(group) if field.name not in without]
            given[name] = group(**{field: given.pop(field) for field in names})
        command(**given)

    spread = [flag for parameter in parameters for flag in _flags(parameter, without)]
    return with_parameters(called, spread)


def with_parameters(command: Command, parameters: Sequence[inspect.Parameter]) -> Command:
    """Set the parameters that typer sees of a command."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _flags(parameter: inspect.Parameter, without: frozenset[str]) -> list[inspect.Parameter]:
    """Return the parameter itself, or one parameter per field of its dataclass."""
    given = parameter.default
    if not is_dataclass(given):
        return [parameter]
    hints = get_type_hints(type(given), include_extras=True)
    return [
        parameter.replace(
            name=field.name, default=getattr(given, field.name), annotation=hints[field.name]
        )
        for field in fields(given)
        if field.name not in without
    ]


@dataclass(frozen=True)
class Settings:
    """Flags with the same names as the config fields that they set."""

    def settings(self) -> dict[str, Any]:
        """Return the config's fields: enums as strings, repeated flags as tuples."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    return (tuple(value) or None) if isinstance(value, list) else value


DATA, MACHINE = "Data", "Machine"


class ReadMode(StrEnum):
    """How finished shards of a cache are read."""

    MAP = "map"
    PREAD = "pread"


class Precision(StrEnum):
    """The dtype of the computation; the weights are float32 in the first two."""

    FP32 = "fp32"
    BF16 = "bf16"
    BF16_WEIGHTS = "bf16-weights"


class Quantization(StrEnum):
    """Bits per weight."""

    EIGHT = "8bit"
    FOUR = "4bit"


Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE…",
        help="Preference data: files, folders, - for standard input; or one store.",
    ),
]
Rows = Annotated[
    list[Path],
    typer.Argument(metavar="FILE…", help="Preference data: files, folders, - for standard input."),
]
Demonstrations = Annotated[
    bool,
    typer.Option(
        "--demonstrations",
        help="Read demonstrations, as `train --loss sft` does.",
        rich_help_panel=DATA,
    ),
]
Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        metavar="FILE…",
        help="Preference data: JSON lines or arrays, CSV, Parquet, Arrow, plain, .gz or .zst; "
        "folders; - for standard input; or one store. Several may follow. `logratio data inspect` "
        "shows how a file is read.",
        rich_help_panel=DATA,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Branch, tag or commit of --model on the Hugging Face hub. Default: main.",
    ),
]
ReadModeOption = Annotated[
    ReadMode,
    typer.Option(help="How the cache is read. Use pread on network file systems: a file truncated "
                 "while it is read then raises an error instead of crashing the process.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
PrecisionOption = Annotated[
    Precision | None,
    typer.Option("--precision", help="bf16: autocast over float32 weights. bf16-weights: weights "
                 "in bf16 too. Default: bf16 on a GPU, fp32 on a CPU.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
StallTimeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="End a stuck process, with the stacks of its threads, if no micro-batch has ended for "
        "so long; a batch of an evaluation, a save and loading may take ten times as long. "
        "0: never. Default: 1800 on a GPU, never on a CPU.",
        rich_help_panel=MACHINE,
    ),
]
ShareBeginnings = Annotated[
    bool,
    typer.Option(
        "--share-beginnings",
        help="Compute a prefix shared by several groups once: a system prompt, or earlier turns of "
        "a conversation. Results change only by rounding. `data report` shows the saving.",
        rich_help_panel=MACHINE,
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the results to this file as JSON; -: to standard output, without the text.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, print what it will need, then stop."),
]


def write_json(file: Path, values: Any) -> None:
    """Write a result to the file of `--json`, or print it for "-"."""
    text = json.dumps(values, indent=1) + "\n"
    if is_stdout(file):
        typer.echo(text, nl=False)
    else:
        write_atomic(file, text)


def is_stdout(file: Path | None) -> bool:
    """Whether a file's name stands for standard output."""
    return file == Path("-")


LIMITS = "Tokenization"


class Lists(StrEnum):
    """How a ranked or scored list becomes records."""

    PAIRS = "pairs"
    BEST_WORST = "best_worst"
    GROUPS = "groups"


class Strings(StrEnum):
    """How to read a string that contains a list of messages."""

    MESSAGES = "messages"
    TEXT = "text"


class PromptTruncation(StrEnum):
    """How to treat a prompt above the limit."""

    DROP = "drop"
    ERROR = "error"
    KEEP_START = "keep_start"
    KEEP_END = "keep_end"


@dataclass(frozen=True)
class Formats:
    """How rows become records, where it cannot be detected."""

    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Read only this format, such as `trl`, `orca`, `openai`. Default: detected.",
            rich_help_panel=DATA,
        ),
    ] = None
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns",
            metavar="NAME=KEY",
            help="Map a format's field to a key of the data: prompt=query; or to a path: "
            "prompt=info.post, chosen=answers.0.text. Repeat the flag, or separate by commas.",
            rich_help_panel=DATA,
        ),
    ] = None
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            metavar="'KEY: VALUE=OUTPUT …'",
            help="Meaning of a label's values, "
            "such as 'preference: 1=output_1 2=output_2 0=tie'. Ranges: 'score: <0=a >0=b 0=tie', "
            "'score: 1..3=a 4=tie 5..7=b'; one-hot columns: 'winner_*: a=output_a b=output_b'; "
            "for single completions: 'label: 1=good 0=bad'.",
            rich_help_panel=DATA,
        ),
    ] = None
    lists: Annotated[
        Lists, typer.Option("--lists", help="How a ranked or scored list becomes records. Methods "
                            "for lists always read whole lists.", rich_help_panel=DATA),
    ] = Lists.PAIRS  # fmt: skip
    strings: Annotated[
        Strings | None,
        typer.Option("--strings", help="How to read a string that contains a list of messages (as "
                     "JSON or Python's repr). Default: messages if all parts of a row are such "
                     "strings, text if none is.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    split: Annotated[
        str | None,
        typer.Option("--split", metavar="NAME", help="The split to read from folders with several, "
                     "such as train. Default: the only one.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    score: Annotated[
        str | None,
        typer.Option("--score", metavar="NAME", help="The score that ranks a list of responses, if "
                     "rows have several: a key, with dots into objects.",
                     rich_help_panel=DATA),
    ] = None  # fmt: skip

    encoding: Annotated[
        str | None,
        typer.Option("--encoding", metavar="NAME", help="Encoding of text files, such as cp1252 or "
                     "utf-16. Default: UTF-8.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    rows: Annotated[
        str | None,
        typer.Option("--rows", metavar="LAYOUT", help="Transform every row first: argilla, "
                     "label-studio, math-shepherd, oasst, prm800k, or your Python function "
                     "MODULE:FUNCTION, which takes a dict and returns a dict, a list of dicts, or "
                     "None to leave the row out.", rich_help_panel=DATA),
    ] = None  # fmt: skip

    group_by: Annotated[
        str | None,
        typer.Option("--group-by", metavar="KEY", help="Merge consecutive rows with the same value "
                     "of a key, such as prompt, into one row with a list under every other key.",
                     rich_help_panel=DATA),
    ] = None  # fmt: skip

    def settings(self, *, demonstrations: bool = False) -> "FormatSettings":
        """Return the settings of these flags.

        Raises:
            FormatSettingsError: A flag is malformed, or flags contradict each other.
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
    """How rows become records, and records become tokens."""

    max_length: Annotated[
        int,
        typer.Option(
            help="Maximum tokens of prompt + completion. Longer completions are truncated.",
            rich_help_panel=LIMITS,
        ),
    ] = 1024
    max_prompt_length: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens of a prompt. Default: max-length − 1.", rich_help_panel=LIMITS
        ),
    ] = None
    prompt_truncation: Annotated[
        PromptTruncation,
        typer.Option(
            help="For a prompt above the limit: drop the record (and count it), stop with an "
            "error, or keep the prompt's start or end.",
            rich_help_panel=LIMITS,
        ),
    ] = PromptTruncation.DROP
    eos: Annotated[
        bool,
        typer.Option(
            "--eos/--no-eos",
            help="Append EOS to text completions. Use --no-eos if the completions are truncated. "
            "With a chat template, the template decides.",
            rich_help_panel=LIMITS,
        ),
    ] = True
    split_special_tokens: Annotated[
        bool,
        typer.Option(
            "--split-special-tokens",
            help="Tokenize the names of special tokens in the data as ordinary text.",
            rich_help_panel=LIMITS,
        ),
    ] = False
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--text",
            help="If the tokenizer has a chat template: format plain text as user and assistant "
            "messages, or leave it as plain text. Default: plain text, with a warning.",
            rich_help_panel=LIMITS,
            show_default=False,
        ),
    ] = None
    date: Annotated[
        str | None,
        typer.Option(
            metavar="2026-11-29",
            help="The date for chat templates that print today's date. Default: the date of the "
            "store, run, policy or cache; otherwise today, which is recorded.",
            rich_help_panel=LIMITS,
        ),
    ] = None

    @property
    def rules(self) -> "TokenizationRules":
        """The tokenization rules of these flags."""
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
        typer.Option("--max-bad-fraction", help="Largest share of malformed rows to accept; each "
                     "is counted and listed. 0: stop at the first.", rich_help_panel=DATA),
    ] = 0.0  # fmt: skip


def read_text_as(chat: bool | None) -> "TextAs | None":
    """Return the setting of --chat and --text; None if neither is given."""
    return None if chat is None else "chat" if chat else "text"


FORMATS, TOKENS, READING = Formats(), Tokens(), Reading()
"""The defaults."""
