"""`logratio train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.flags import takes_flags
from logratio.cli.reading import READING, Reading
from logratio.cli.training_flags import (
    LORA,
    MACHINE,
    OBJECTIVE,
    UPDATE,
    Lora,
    Machine,
    Objective,
    Update,
)

if TYPE_CHECKING:
    from logratio.forecast import Forecast
    from logratio.training.setup import Dataset
    from logratio.training.trainer import TrainResult


@takes_flags
def train(
    model: Annotated[Path, typer.Option(help="Folder of the model to start from.")],
    data: options.Data,
    output: Annotated[Path, typer.Option(help="Folder for the trained model and its metrics.")],
    cache: Annotated[
        Path | None,
        typer.Option(help="Reference log-probs made by `precompute`: no reference in memory."),
    ] = None,
    precompute: Annotated[
        bool, typer.Option("--precompute", help="Score what --cache lacks first, then train.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of the reference model. Default: --model itself.")
    ] = None,
    objective: Objective = OBJECTIVE,
    update: Update = UPDATE,
    lora: Lora = LORA,
    reading: Reading = READING,
    machine: Machine = MACHINE,
    dry_run: options.DryRun = False,
) -> None:  # fmt: skip
    """Train a policy on preference pairs.

    Ctrl-C saves a checkpoint and ends; --resume goes on from it, bit for bit on a CPU and, with
    --deterministic, on a GPU. The output folder is
    a model folder for transformers, with metrics.jsonl and TensorBoard's events beside it.
    """
    from logratio.training import TrainConfig
    from logratio.training.trainer import prepare

    ready = prepare(
        TrainConfig(
            model,
            data,
            output,
            cache=cache,
            precompute=precompute,
            reference=reference,
            **objective.settings(),
            **update.settings(),
            **machine.settings(),
            lora=lora.settings(),
            rules=reading.rules,
            formats=reading.settings(),
            max_bad_fraction=reading.max_bad_fraction,
        ),
        dry_run=dry_run,
    )
    if not ready.finished:
        announce(ready.dataset, ready.forecast)
    if ready.finished or not dry_run:
        _tell(ready.run())


def _tell(result: "TrainResult") -> None:
    last = result.history[-1] if result.history else {}
    shown = ("loss", "rewards/accuracies", "rewards/margins")
    metrics = ", ".join(f"{name} {last[name]:.4f}" for name in shown if name in last)
    typer.echo(f"last update, before its step: {metrics}")
    begin = "already finished: " if result.was_finished else ""
    updates = "1 update" if result.steps == 1 else f"{result.steps:,} updates"
    typer.echo(f"{begin}{updates}; model, metrics and settings: {result.output}")


def announce(dataset: "Dataset", forecast: "Forecast") -> None:
    """Say what was read and what is needed, on standard error: results go to standard output."""
    from logratio.data.analysis import analyse

    report = analyse(dataset.store, dataset.report, tokenizer=dataset.tokenizer).to_text()
    typer.echo(f"{report}\n{forecast.to_text()}", err=True)


__all__ = ["announce", "train"]
