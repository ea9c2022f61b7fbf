"""`logratio precompute`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from logratio.cli import options
from logratio.cli.config import takes_config
from logratio.cli.options import (
    READING,
    Quantization,
    Reading,
    ReadMode,
    Settings,
    takes_flags,
)
from logratio.cli.train import announce


class Engine(StrEnum):
    """Where `precompute` runs."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class Machine(Settings):
    """Device, precision, and how the work is divided."""

    share: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Score only this share of the groups, split by content hash: 1/8 to 8/8 in a job "
            "array. Under torchrun the share is set automatically.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    engine: Annotated[
        Engine,
        typer.Option(
            help="ray: use actors on an existing Ray cluster (RAY_ADDRESS) or a local one. All "
            "machines must have access to the model and the cache.",
            rich_help_panel=options.MACHINE,
        ),
    ] = Engine.LOCAL
    workers: Annotated[
        int | None,
        typer.Option(
            help="Number of Ray actors. Default: one per GPU, or the number of CPUs − 1.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens per forward pass. Default: found by trial. Results change only by "
            "rounding.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    share_beginnings: options.ShareBeginnings = False
    precision: options.PrecisionOption = None
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Load the weights in 8 or 4 bits (bitsandbytes). This is another reference, "
            "with a separate folder in the cache.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    read_mode: options.ReadModeOption = ReadMode.MAP
    stall_timeout: options.StallTimeout = None
    device: options.Device = None


MACHINE = Machine()
"""The defaults."""


@takes_config("PrecomputeConfig")
@takes_flags
def precompute(
    model: Annotated[
        Path, typer.Option(help="Folder or Hugging Face id of the reference model or adapter.")
    ],
    data: options.Data,
    cache: Annotated[Path, typer.Option(help="Folder of the cache; created if missing.")],
    revision: options.Revision = None,
    reading: Reading = READING,
    mismatched: Annotated[
        bool,
        typer.Option(
            "--mismatched",
            help="Score the answers to other prompts too that `train --loss kto` adds to the data.",
        ),
    ] = False,
    sums_only: Annotated[
        bool,
        typer.Option("--sums-only", help="Store only the sum over each completion's loss tokens: "
                     "44 bytes, for billions of completions. Per-token losses cannot use it."),
    ] = False,
    machine: Machine = MACHINE,
    dry_run: options.DryRun = False,
) -> None:  # fmt: skip
    """Compute the reference log-probs of every completion once, and store them in a cache.

    `train --cache` then needs no reference model in memory. May be killed at any moment: run it
    again to resume. Entries stay valid when learning rate, β, loss or data order change. Any number
    of processes and hosts may fill one cache: use torchrun, --share or Ray.
    """
    from logratio.training.config import PrecomputeConfig
    from logratio.training.precomputation import prepare

    ready = prepare(
        PrecomputeConfig(
            model,
            data,
            cache,
            sums_only=sums_only,
            mismatched=mismatched,
            revision=revision,
            **machine.settings(),
            rules=reading.rules,
            formats=reading.settings(),
            max_bad_fraction=reading.max_bad_fraction,
        )
    )
    if ready.share.rank == 0:
        announce(ready.dataset, ready.forecast)
    if not dry_run:
        result = ready.run()
        part = f"share {result.share}: " if ready.share.count > 1 else ""
        typer.echo(f"{part}{result.to_text()}")
