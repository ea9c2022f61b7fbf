"""`logratio sweep`: a grid of runs, evaluated on held-out pairs."""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logratio.cli import options
from logratio.cli.config import takes_config
from logratio.cli.objective_flags import OBJECTIVE, Objective
from logratio.cli.options import READING, Reading, Settings, takes_flags
from logratio.cli.train_flags import (
    HELD_OUT,
    LORA,
    MACHINE,
    UPDATE,
    WATCHING,
    HeldOut,
    Lora,
    Machine,
    Update,
    Watching,
)

if TYPE_CHECKING:
    from logratio.training.config import SweepConfig
    from logratio.training.sweep_results import SweepResult, SweepRow

GRID = "Grid"
OWN = {"loss", "beta", "lr", "seed", "overwrite", "resume", "eval_data", "max_new_tokens"}
"""Settings of a run that a sweep sets itself, or takes as lists."""


class Engine(StrEnum):
    """Where the runs are."""

    LOCAL = "local"
    RAY = "ray"


def _repeated(help_text: str) -> Any:
    """Return an option for one or more values of the grid."""
    return typer.Option(
        metavar="VALUE…", help=f"{help_text}; several may follow.", rich_help_panel=GRID
    )


EvalData = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE…",
        help="Held-out preference data; several may follow.",
        rich_help_panel=options.DATA,
    ),
]
Output = Annotated[Path, typer.Option(help="Folder of the sweep, with one folder per run.")]
Losses = Annotated[list[str] | None, _repeated("A method for pairs (default: dpo)")]
Betas = Annotated[
    list[float] | None, _repeated("Weight of the KL term (default: that of the loss)")
]
Rates = Annotated[list[float] | None, _repeated("Peak learning rate (default: 1e-6)")]
Seeds = Annotated[list[int] | None, _repeated("Seed of the data order (default: 0)")]
Cache = Annotated[
    Path | None, typer.Option(help="Reference log-probs. Default: a folder in --output.")
]
Reference = Annotated[
    Path | None, typer.Option(help="Folder of the reference model. Default: --model itself.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Train all runs again.")]


@dataclass(frozen=True)
class Choice(Settings):
    """How the runs are compared and where they run."""

    samples: Annotated[
        int,
        typer.Option(
            help="Completions sampled from each policy to estimate its KL to the reference; 0: no "
            "estimate.",
            rich_help_panel=GRID,
        ),
    ] = 100
    kl_budget: Annotated[
        float | None,
        typer.Option(
            help="Choose among runs with at most this KL, in nats per completion.",
            rich_help_panel=GRID,
        ),
    ] = None
    engine: Annotated[
        Engine,
        typer.Option(
            help="local: one run after the other. ray: several at a time on a Ray cluster (Ray "
            "Tune), each with one GPU, or one CPU if there are no GPUs.",
            rich_help_panel=options.MACHINE,
        ),
    ] = Engine.LOCAL
    workers: Annotated[
        int | None,
        typer.Option(
            help="Runs at a time on Ray. Default: as many as fit.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None


CHOICE = Choice()


@takes_config("SweepConfig")
@partial(takes_flags, without=frozenset({"resume"}))
def sweep(
    model: Annotated[Path, typer.Option(help="Folder of the model to start from.")],
    data: options.Data,
    eval_data: EvalData,
    output: Output,
    loss: Losses = None,
    beta: Betas = None,
    lr: Rates = None,
    seed: Seeds = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest sampled completion.", rich_help_panel=GRID)
    ] = 128,
    cache: Cache = None,
    reference: Reference = None,
    overwrite: Overwrite = False,
    choice: Choice = CHOICE,
    objective: Objective = OBJECTIVE,
    update: Update = UPDATE,
    held_out: HeldOut = HELD_OUT,
    watching: Watching = WATCHING,
    lora: Lora = LORA,
    reading: Reading = READING,
    machine: Machine = MACHINE,
    dry_run: options.DryRun = False,
) -> None:
    """Train every combination of --loss, --beta, --lr and --seed, and choose one.

    The data is tokenized once and the reference scores it once. Every run is evaluated on
    --eval-data; the results are in sweep.jsonl and sweep.svg. May be stopped at any moment: run it
    again to continue. Exits with 1 if a run failed.
    """
    from logratio.training.config import SweepConfig, TrainConfig

    base = TrainConfig(
        model,
        data,
        output,
        cache=cache,
        reference=reference,
        **_of_runs(objective, update, held_out, watching, machine),
        overwrite=overwrite,
        lora=lora.settings(),
        rules=reading.rules,
        formats=reading.settings(),
        max_bad_fraction=reading.max_bad_fraction,
    )
    grid: dict[str, Any] = {
        "loss": tuple(loss or ()),
        "beta": tuple(beta or ()),
        "lr": tuple(lr or ()),
        "seed": tuple(seed or ()),
    }
    more = choice.settings() | {"max_new_tokens": max_new_tokens}
    _run(SweepConfig(base, eval_data, **grid, **more), dry_run)


def _of_runs(*groups: Settings) -> dict[str, Any]:
    """Return the settings that all runs share."""
    shared = {name: value for group in groups for name, value in group.settings().items()}
    return {name: value for name, value in shared.items() if name not in OWN}


def _run(config: "SweepConfig", dry_run: bool) -> None:
    from logratio.training.sweep_runs import prepare

    ready = prepare(config)
    if dry_run:
        typer.echo(ready.rehearse().to_text(), err=True)
        for run in ready.runs:
            typer.echo(Path(run.output).name)
        return
    result = ready.run()
    _print_result(result)
    if any(row.failed for row in result.rows):
        raise typer.Exit(1)


def _print_result(result: "SweepResult") -> None:
    """Print one line per run, the most accurate first, and the chosen run."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "loss", "β", "lr", "seed", "accuracy, 95 %", "KL, nats, 95 %", "margin")
    for row in result.ranked:
        chosen = "→" if row == result.best else ""
        settings = row.loss, f"{row.beta:g}", f"{row.lr:g}", str(row.seed)
        table.add_row(chosen, *settings, *_figures(row))
    Console().print(table)
    best = result.best.name if result.best else "none"
    typer.echo(f"chosen: {best} ({result.reason})")
    for row in result.rows:
        if row.failed:
            typer.echo(f"{row.name} failed: {row.failed}")
    typer.echo(f"models, rows (sweep.jsonl) and picture (sweep.svg): {result.output}")


def _figures(row: "SweepRow") -> tuple[str, ...]:
    from logratio.intervals import spread

    if row.failed or not row.evaluation:
        return ("failed", "", "")
    low, high = row.accuracy_interval
    kl = f"{row.kl:.3g}{spread(row.kl_error)}" if row.kl == row.kl else ""
    return f"{row.accuracy:.3f} ({low:.2f}…{high:.2f})", kl, f"{row.evaluation['margin']:.3g}"
