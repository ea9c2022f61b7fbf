"""`logratio train`, with its flags by what they are about."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logratio.cli import options
from logratio.cli.options import READING, Reading, ReadMode, Settings, takes_flags

if TYPE_CHECKING:
    from logratio.forecast import Forecast
    from logratio.training.config import LoraSettings
    from logratio.training.dataset import Dataset
    from logratio.training.trainer import TrainResult

LORA_PANEL, UPDATE_PANEL = "LoRA", "Update"


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


class Compile(StrEnum):
    """Whether decoder layers are compiled."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


class Loss(StrEnum):
    """The losses of `logratio.training.losses`."""

    DPO = "dpo"
    IPO = "ipo"
    SIMPO = "simpo"
    SFT = "sft"


@dataclass(frozen=True)
class Objective(Settings):
    """What is minimised."""

    loss: Annotated[
        Loss, typer.Option(help="sft trains on demonstrations, or on the chosen of pairs.")
    ] = Loss.DPO
    beta: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL term: a larger one keeps the policy closer to the "
            "reference. Default: 0.1 for dpo and ipo, 2 for simpo."
        ),
    ] = None
    label_smoothing: Annotated[
        float, typer.Option(help="Share of pairs thought flipped (dpo, simpo).")
    ] = 0.0
    gamma: Annotated[float, typer.Option(help="The margin that simpo asks for.")] = 1.0


@dataclass(frozen=True)
class Update(Settings):
    """How data become updates."""

    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=UPDATE_PANEL)] = (
        1e-6
    )
    warmup: Annotated[
        float,
        typer.Option(
            help="Share of the updates in which the rate rises; then a cosine to 0.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 0.1
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are scaled to this norm.", rich_help_panel=UPDATE_PANEL)
    ] = 1.0
    batch_size: Annotated[
        int,
        typer.Option(help="Pairs per update, whatever the memory.", rich_help_panel=UPDATE_PANEL),
    ] = 32
    epochs: Annotated[
        int, typer.Option(help="Passes over the data.", rich_help_panel=UPDATE_PANEL)
    ] = 1
    mix: Annotated[
        list[float] | None,
        typer.Option(
            metavar="WEIGHT",
            help="Of each of --data, in their order; repeat it. An "
            "epoch draws from them by weight. Default: every record once.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the order.", rich_help_panel=UPDATE_PANEL)] = 0
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="On a GPU, the same bits in every run on it: slower kernels that add in a fixed "
            "order. A CPU gives the same bits in any case.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = False
    save_every: Annotated[
        int,
        typer.Option(
            help="Updates between checkpoints; 0 for none but at an interrupt.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 200
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest valid checkpoint in --output.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a run in --output by this one. Without it, a finished run with the same "
            "settings ends at once with 0, and any other run is an error.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = False


@dataclass(frozen=True)
class Lora:
    """Adapters instead of all weights."""

    lora: Annotated[
        bool,
        typer.Option(
            "--lora",
            help="Train low-rank adapters; with them off, the model is its own reference.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = False
    lora_rank: Annotated[
        int | None, typer.Option(help="Their rank. Default: 16.", rich_help_panel=LORA_PANEL)
    ] = None
    lora_alpha: Annotated[
        float | None, typer.Option(help="Scale × rank. Default: 32.", rich_help_panel=LORA_PANEL)
    ] = None
    lora_target: Annotated[
        list[str] | None,
        typer.Option(
            help="A module's name; repeat it. Default: every linear layer but the head.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = None

    def settings(self) -> "LoraSettings | None":
        """Return the adapters' settings, where adapters are asked for.

        Raises:
            ConfigError: nobody asked for adapters, and something is said of them.
        """
        from logratio.errors import ConfigError
        from logratio.training.config import LoraSettings

        targets = tuple(self.lora_target) if self.lora_target is not None else None
        given = {"rank": self.lora_rank, "alpha": self.lora_alpha, "targets": targets}
        chosen: dict[str, Any] = {k: value for k, value in given.items() if value is not None}
        if chosen and not self.lora:
            raise ConfigError(
                f"lora-{next(iter(chosen)).removesuffix('s')} is given without --lora"
            )
        return LoraSettings(**chosen) if self.lora else None


@dataclass(frozen=True)
class Machine(Settings):
    """What is computed on, and in how many bits."""

    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens computed at a time. Lower it when memory is short: no result "
            "changes. Default: 2,048 on a CPU, 8,192 on a GPU.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    activation_checkpointing: Annotated[
        ActivationCheckpointing,
        typer.Option(
            help="Layers that keep their input only and are computed twice: as many as would not "
            "fit, none or all. No result changes.",
            rich_help_panel=options.MACHINE,
        ),
    ] = ActivationCheckpointing.AUTO
    offload_activations: Annotated[
        bool,
        typer.Option(
            "--offload-activations",
            help="Keep activations in host memory until the backward pass: less GPU memory for two "
            "copies over the bus. No result changes.",
            rich_help_panel=options.MACHINE,
        ),
    ] = False
    share_beginnings: options.ShareBeginnings = False
    compile_layers: Annotated[
        Compile,
        typer.Option(
            "--compile",
            help="Compile the layers (torch.compile): up to a minute at the start. auto times both "
            "ways first, and compiles where that is faster.",
            rich_help_panel=options.MACHINE,
        ),
    ] = Compile.OFF
    precision: options.PrecisionOption = None
    optimizer: Annotated[
        OptimizerName,
        typer.Option(
            help="adamw8bit keeps moments in 8 bits (bitsandbytes), inexact; adamw-host is exact, "
            "in host memory, slower by two copies of the weights an update.",
            rich_help_panel=options.MACHINE,
        ),
    ] = OptimizerName.ADAMW
    read_mode: options.ReadModeOption = ReadMode.MAP
    device: options.Device = None


OBJECTIVE, UPDATE, LORA, MACHINE = Objective(), Update(), Lora(), Machine()
"""The defaults."""


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
    from logratio.training.config import TrainConfig
    from logratio.training.trainer import DPOTrainer

    trainer = DPOTrainer(
        config=TrainConfig(
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
    if not trainer.finished:
        announce(trainer.dataset, trainer.forecast)
    if trainer.finished or not dry_run:
        _tell(trainer.train())


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
    from logratio.data.analysis.report import analyse

    report = analyse(dataset.store, dataset.report, tokenizer=dataset.tokenizer).to_text()
    typer.echo(f"{report}\n{forecast.to_text()}", err=True)
