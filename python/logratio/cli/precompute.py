"""`logratio precompute`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from logratio.cli import options
from logratio.cli.options import READING, Reading, ReadMode, Settings, takes_flags
from logratio.cli.train import announce


class Engine(StrEnum):
    """Where `precompute` computes."""

    LOCAL = "local"
    RAY = "ray"


class Quantization(StrEnum):
    """How few bits a weight is loaded in."""

    EIGHT = "8bit"
    FOUR = "4bit"


@dataclass(frozen=True)
class Machine(Settings):
    """What is computed on, in how many bits, and by how many."""

    share: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Score only this part of the groups, told by content: "
            "for job arrays, 1/8 to 8/8. torchrun shares by itself.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    engine: Annotated[
        Engine,
        typer.Option(
            help="ray: actors on an existing Ray cluster (RAY_ADDRESS) or a local "
            "one. All machines must see the model and the cache.",
            rich_help_panel=options.MACHINE,
        ),
    ] = Engine.LOCAL
    workers: Annotated[
        int | None,
        typer.Option(
            help="Actors of Ray. Default: one a GPU, or one a CPU but one.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens computed at a time. Default: found by trying. No result changes "
            "beyond rounding.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    share_beginnings: options.ShareBeginnings = False
    precision: options.PrecisionOption = None
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Load the weights in 8 or 4 bits: another reference, with a folder of its own.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    read_mode: options.ReadModeOption = ReadMode.MAP
    device: options.Device = None


MACHINE = Machine()
"""The defaults."""


@takes_flags
def precompute(
    model: Annotated[Path, typer.Option(help="Folder of the reference model or adapter.")],
    data: options.Data,
    cache: Annotated[Path, typer.Option(help="Root of the cache; made where it does not exist.")],
    reading: Reading = READING,
    sums_only: Annotated[
        bool,
        typer.Option("--sums-only", help="Keep one sum a completion, over the tokens that count: "
                     "44 bytes, for billions. Losses that look at single tokens cannot read it."),
    ] = False,
    machine: Machine = MACHINE,
    dry_run: options.DryRun = False,
) -> None:  # fmt: skip
    """Score every completion with the reference model, once, into a cache.

    `train --cache` then holds no reference model. Kill it at any moment and run it again: it goes
    on where it was. Learning rate, β, loss and order never make an entry stale. Any number of
    processes and hosts may fill one cache: start it under torchrun, or with --share, or on Ray.
    """
    from logratio.training.config import PrecomputeConfig
    from logratio.training.precomputation import prepare

    ready = prepare(
        PrecomputeConfig(
            model,
            data,
            cache,
            sums_only=sums_only,
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
