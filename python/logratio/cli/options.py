"""Options that several commands share, each described once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

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
