"""Options that several commands share, each described once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DATA, LIMITS, MACHINE = "Data", "How records become tokens", "Machine"


class Precision(StrEnum):
    """What is computed in; weights are float32 in both."""

    FP32 = "fp32"
    BF16 = "bf16"


class PromptTruncation(StrEnum):
    """What becomes of a prompt above the limit."""

    DROP = "drop"
    ERROR = "error"
    KEEP_START = "keep_start"
    KEEP_END = "keep_end"


Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        metavar="FILE…",
        help="Preference records: JSONL, JSON, CSV, Parquet, Arrow (text also .gz, .zst), folders "
        "of these, or - for stdin; prompt/chosen/rejected as strings or chat messages, or "
        "Anthropic-HH transcripts. Several may follow.",
        rich_help_panel=DATA,
    ),
]
MaxBad = Annotated[
    float,
    typer.Option(
        "--max-bad-fraction",
        help="Share of malformed rows to go on with; each is counted and named. 0 stops at any.",
        rich_help_panel=DATA,
    ),
]
MaxLength = Annotated[
    int,
    typer.Option(help="Tokens of prompt + completion; completions are cut, and counted.",
                 rich_help_panel=LIMITS),
]  # fmt: skip
MaxPromptLength = Annotated[
    int | None,
    typer.Option(help="Tokens of a prompt. Default: max-length − 1.", rich_help_panel=LIMITS),
]
Truncation = Annotated[
    PromptTruncation,
    typer.Option(
        help="A prompt above the limit: drop the record (counted), stop with an error, or keep "
        "its start or end.",
        rich_help_panel=LIMITS,
    ),
]
Eos = Annotated[
    bool,
    typer.Option(
        "--eos/--no-eos",
        help="End text completions with EOS. --no-eos when completions were cut short. A chat "
        "template decides by itself.",
        rich_help_panel=LIMITS,
    ),
]
TokenBudget = Annotated[
    int,
    typer.Option(
        help="Tokens computed at a time. Lower it when memory is short: no result changes.",
        rich_help_panel=MACHINE,
    ),
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="bf16 is autocast over float32 weights.",
                            rich_help_panel=MACHINE),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what it will need, and stop there."),
]
