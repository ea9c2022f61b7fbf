"""Options that several commands share, each described once."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from logratio.data import TokenizationRules

DATA, LIMITS, MACHINE = "Data", "How records become tokens", "Machine"


class ReadMode(StrEnum):
    """How sealed shards of a cache are read."""

    MAP = "map"
    PREAD = "pread"


class Precision(StrEnum):
    """What is computed in; weights are float32 in the first two."""

    FP32 = "fp32"
    BF16 = "bf16"
    BF16_WEIGHTS = "bf16-weights"


class OptimizerName(StrEnum):
    """Where the optimizer keeps its numbers, and how many bits they have."""

    ADAMW = "adamw"
    EIGHT = "adamw8bit"
    HOST = "adamw-host"


class ActivationCheckpointing(StrEnum):
    """Which layers are computed twice to save memory."""

    AUTO = "auto"
    OFF = "off"
    ALL = "all"


class PromptTruncation(StrEnum):
    """What becomes of a prompt above the limit."""

    DROP = "drop"
    ERROR = "error"
    KEEP_START = "keep_start"
    KEEP_END = "keep_end"


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
SplitSpecial = Annotated[
    bool,
    typer.Option(
        "--split-special-tokens",
        help="Read special tokens that are spelled in plain text as text.",
        rich_help_panel=LIMITS,
    ),
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
Checkpointing = Annotated[
    ActivationCheckpointing,
    typer.Option(
        "--activation-checkpointing",
        help="Layers that keep their input only and are computed twice: as many as would not fit, "
        "none or all. No result changes.",
        rich_help_panel=MACHINE,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile-layers",
        help="Compile the layers (torch.compile): up to a minute at the start, worth a measurement "
        "on a GPU.",
        rich_help_panel=MACHINE,
    ),
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload-activations",
        help="Keep activations in host memory until the backward pass: less GPU memory for two "
        "copies over the bus. No result changes.",
        rich_help_panel=MACHINE,
    ),
]
ReadModeOption = Annotated[
    ReadMode,
    typer.Option(help="How the cache is read. pread is for network file systems: a file that is "
                 "cut meanwhile is then an error, not a crash.", rich_help_panel=MACHINE),
]  # fmt: skip
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="bf16 is autocast over float32 weights; bf16-weights rounds "
                 "the weights too.", rich_help_panel=MACHINE),
]  # fmt: skip
Optimizer = Annotated[
    OptimizerName,
    typer.Option(
        "--optimizer",
        help="adamw8bit keeps moments in 8 bits (bitsandbytes), inexact; adamw-host is exact, in "
        "host memory, slower by two copies of the weights an update.",
        rich_help_panel=MACHINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one.",
                 rich_help_panel=MACHINE),
]  # fmt: skip
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, say what it will need, and stop there."),
]


def rules(
    max_length: int,
    max_prompt_length: int | None,
    prompt_truncation: PromptTruncation,
    eos: bool,
    split_special_tokens: bool = False,
) -> "TokenizationRules":
    """Gather the options that decide how records become tokens."""
    from logratio.data import TokenizationRules

    return TokenizationRules(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        prompt_truncation=prompt_truncation.value,
        append_eos=eos,
        split_special_tokens=split_special_tokens,
    )
