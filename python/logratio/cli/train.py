"""`logratio train`, and the notes that commands print before their work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.cluster import CLUSTER, ClusterFlags, print_forecast
from logratio.cli.config import takes_config
from logratio.cli.objective_flags import OBJECTIVE, SOURCE, Objective, ReferenceSource
from logratio.cli.options import READING, Reading, takes_flags
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
from logratio.errors import ConfigError

if TYPE_CHECKING:
    from logratio.forecast import Forecast
    from logratio.training.cluster import Cluster
    from logratio.training.config import TrainConfig
    from logratio.training.dataset import Dataset
    from logratio.training.run_folder import TrainResult


Stagewise = Annotated[
    bool,
    typer.Option(
        "--stagewise",
        help="Train one stage for each file of --data, in their order. The policy and the "
        "reference of a stage are the policy of the stage before (sDPO).",
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="With --world-size: write the forecast to this file as JSON; -: to standard "
        "output, without the text.",
    ),
]


@takes_config("TrainConfig")
@takes_flags
def train(
    model: Annotated[
        Path, typer.Option(help="Folder or Hugging Face id of the model to start from.")
    ],
    data: options.Data,
    output: Annotated[Path, typer.Option(help="Folder for the trained model and its metrics.")],
    revision: options.Revision = None,
    source: ReferenceSource = SOURCE,
    objective: Objective = OBJECTIVE,
    update: Update = UPDATE,
    held_out: HeldOut = HELD_OUT,
    watching: Watching = WATCHING,
    lora: Lora = LORA,
    reading: Reading = READING,
    machine: Machine = MACHINE,
    cluster: ClusterFlags = CLUSTER,
    stagewise: Stagewise = False,
    dry_run: options.DryRun = False,
    json_file: JsonFile = None,
) -> None:
    """Train a policy on preference pairs.

    Ctrl-C saves a checkpoint and stops; --resume continues from it, bitwise identical on a CPU, and
    on a GPU with --deterministic. The output folder is a transformers model folder that also
    contains metrics.jsonl and TensorBoard events.
    """
    from logratio.training.config import TrainConfig

    planned = cluster.cluster(dry_run=dry_run, to_file=json_file is not None)
    config = TrainConfig(
        model,
        data,
        output,
        revision=revision,
        **source.settings(),
        **objective.settings(),
        **update.settings(),
        **held_out.settings(),
        **watching.settings(),
        **machine.settings(),
        lora=lora.settings(),
        adapter=lora.adapter.value,
        rules=reading.rules,
        formats=reading.settings(),
        max_bad_fraction=reading.max_bad_fraction,
    )
    if planned:
        _plan(config, planned, json_file)
    elif stagewise:
        _train_stages(config, dry_run=dry_run)
    else:
        _train(config, dry_run=dry_run)


def _train(config: "TrainConfig", *, dry_run: bool) -> None:
    """Train, or only check and forecast; the first of several processes prints."""
    from logratio.training.trainer import DPOTrainer

    trainer = DPOTrainer(config=config, dry_run=dry_run)
    if not trainer.processes.is_first:
        if trainer.finished or not dry_run:
            trainer.train()
        return
    if not trainer.finished:
        announce(trainer.dataset, trainer.forecast)
    if trainer.finished or not dry_run:
        _print_result(trainer.train())


def _train_stages(config: "TrainConfig", *, dry_run: bool) -> None:
    """Train the stages one after the other."""
    from logratio.training.stages import train_stages

    if dry_run:
        raise ConfigError("--stagewise has no --dry-run: later stages start from earlier ones")
    _print_result(train_stages(config))


def _plan(config: "TrainConfig", cluster: "Cluster", json_file: Path | None) -> None:
    """Print the forecast for a cluster."""
    from logratio.training.cluster_plan import plan_cluster

    found = plan_cluster(config, cluster)
    if not options.is_stdout(json_file):
        print_forecast(found)
    if json_file:
        options.write_json(json_file, found.to_dict())


def _print_result(result: "TrainResult") -> None:
    from logratio.forecast import count

    last = result.history[-1] if result.history else {}
    shown = ("loss", "rewards/accuracies", "rewards/margins")
    metrics = ", ".join(f"{name} {last[name]:.4f}" for name in shown if name in last)
    typer.echo(f"last batch, before its update: {metrics}")
    if result.best_step is not None:
        row = next(row for row in result.evaluations if row["step"] == result.best_step)
        loss = f"held-out loss {row['eval_loss']:.4f}"
        typer.echo(f"the saved model is that of update {result.best_step:,}: {loss}")
    begin = "already finished: " if result.was_finished else ""
    typer.echo(
        f"{begin}{count(result.steps, 'update')}; model, metrics and settings: {result.output}"
    )


def announce(dataset: "Dataset", forecast: "Forecast") -> None:
    """Print the data's counts, its warnings and the forecast on standard error.

    Standard output is for results.
    """
    from logratio.data.analysis.report import analyse

    report = analyse(dataset.store, dataset.report, tokenizer=dataset.tokenizer).to_summary()
    typer.echo(f"{report}\n{forecast.to_text()}", err=True)
