"""Flags of a training run, grouped by help panel; `logratio sweep` has them too."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.options import ReadMode, Settings
from logratio.errors import ConfigError

if TYPE_CHECKING:
    from logratio.training.config import LoraSettings

LORA_PANEL, UPDATE_PANEL, EVALUATION_PANEL = "LoRA", "Update", "Held-out evaluation"
WATCHING_PANEL = "Watching the run"


class OptimizerName(StrEnum):
    """Where the optimizer state is stored, and in how many bits."""

    ADAMW = "adamw"
    EIGHT = "adamw8bit"
    HOST = "adamw-host"


class ActivationCheckpointing(StrEnum):
    """Which layers recompute their activations in the backward pass to save memory."""

    AUTO = "auto"
    OFF = "off"
    ALL = "all"


class Parallel(StrEnum):
    """How several processes hold the model."""

    AUTO = "auto"
    DDP = "ddp"
    FSDP = "fsdp"
    HSDP = "hsdp"


class Compile(StrEnum):
    """Whether the decoder layers are compiled."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


class Schedule(StrEnum):
    """Decay of the learning rate after the warmup."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"
    WSD = "wsd"


class DecayType(StrEnum):
    """How the schedule wsd falls."""

    LINEAR = "linear"
    COSINE = "cosine"
    ROOT = "1-sqrt"


class StartAdapter(StrEnum):
    """How a run starts if its model is an adapter."""

    MERGE = "merge"
    CONTINUE = "continue"


@dataclass(frozen=True)
class Update(Settings):
    """Optimisation schedule, checkpoints and the output folder."""

    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=UPDATE_PANEL)] = (
        1e-6
    )
    warmup: Annotated[
        float,
        typer.Option(
            help="Updates with linear warmup: below 1 a share of all, else their number; "
            "--lr-scheduler decays the rate after.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 0.1
    lr_scheduler: Annotated[
        Schedule,
        typer.Option(
            help="Decay of the learning rate. wsd: constant, then falling over the last --decay.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = Schedule.COSINE
    min_lr_rate: Annotated[
        float,
        typer.Option(
            help="Learning rate at the end, as a share of --lr.", rich_help_panel=UPDATE_PANEL
        ),
    ] = 0.0
    decay: Annotated[
        float,
        typer.Option(
            help="Updates in which wsd falls: below 1 a share of those after the warmup, else "
            "their number.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 0.2
    decay_type: Annotated[
        DecayType,
        typer.Option(help="How wsd falls.", rich_help_panel=UPDATE_PANEL),
    ] = DecayType.LINEAR
    weight_decay: Annotated[
        float,
        typer.Option(
            help="Weight decay of matrices (AdamW); norms and biases have none.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 0.0
    adam_beta1: Annotated[
        float,
        typer.Option(help="Decay rate of the first moments.", rich_help_panel=UPDATE_PANEL),
    ] = 0.9
    adam_beta2: Annotated[
        float,
        typer.Option(help="Decay rate of the second moments.", rich_help_panel=UPDATE_PANEL),
    ] = 0.999
    adam_epsilon: Annotated[
        float,
        typer.Option(help="Added to the root of the second moments.", rich_help_panel=UPDATE_PANEL),
    ] = 1e-8
    max_grad_norm: Annotated[
        float, typer.Option(help="Clip gradients to this norm.", rich_help_panel=UPDATE_PANEL)
    ] = 1.0
    batch_size: Annotated[
        int,
        typer.Option(
            help="Pairs per optimizer step. Does not affect memory use.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 32
    epochs: Annotated[
        int, typer.Option(help="Passes over the data.", rich_help_panel=UPDATE_PANEL)
    ] = 1
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Number of updates, in place of --epochs; data is repeated or cut.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = None
    mix: Annotated[
        list[float] | None,
        typer.Option(
            metavar="WEIGHT…",
            help="Sampling weight of each --data, in order. Default: no weights, every record "
            "once per epoch.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(help="Seed of the data order.", rich_help_panel=UPDATE_PANEL)
    ] = 0
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="On a GPU, use slower deterministic kernels, so that runs are bitwise identical. "
            "Runs on a CPU always are.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = False
    save_every: Annotated[
        int,
        typer.Option(
            help="Updates between checkpoints; 0: only when interrupted.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 200
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            help="Checkpoints to keep during the run; a finished run needs none.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = 2
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from the newest valid checkpoint in --output.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace the run in --output. Without it, the command exits at once with 0 if "
            "--output has a finished run with the same settings; any other run is an error.",
            rich_help_panel=UPDATE_PANEL,
        ),
    ] = False


@dataclass(frozen=True)
class HeldOut(Settings):
    """Evaluation of held-out data during the run."""

    eval_data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE…",
            help="Held-out data, in the same forms as --data. Several may follow.",
            rich_help_panel=EVALUATION_PANEL,
        ),
    ] = None
    eval_share: Annotated[
        float,
        typer.Option(
            help="Share of --data to hold out instead, chosen by prompt, such as 0.05.",
            rich_help_panel=EVALUATION_PANEL,
        ),
    ] = 0.0
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Updates between evaluations. Default: one after each epoch. The last update is "
            "always followed by one.",
            rich_help_panel=EVALUATION_PANEL,
        ),
    ] = None
    eval_samples: Annotated[
        int,
        typer.Option(
            help="Completions to sample at each evaluation, for the KL divergence from the "
            "reference and samples.jsonl.",
            rich_help_panel=EVALUATION_PANEL,
        ),
    ] = 0
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Maximum length of a sampled completion.", rich_help_panel=EVALUATION_PANEL
        ),
    ] = 128
    best_metric: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Save the model that was best in this metric, such as rewards/accuracies or "
            "loss, instead of the last one.",
            rich_help_panel=EVALUATION_PANEL,
        ),
    ] = None
    early_stop: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many evaluations in a row without a better --best-metric.",
            rich_help_panel=EVALUATION_PANEL,
        ),
    ] = None


@dataclass(frozen=True)
class Watching(Settings):
    """Trackers of the run, and its report."""

    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TRACKER…",
            help="tensorboard, wandb, mlflow, trackio, none or all; several may follow. wandb, "
            "mlflow and trackio need their packages. Default: tensorboard.",
            rich_help_panel=WATCHING_PANEL,
        ),
    ] = None
    run_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run in trackers. Default: the name of --output.",
            rich_help_panel=WATCHING_PANEL,
        ),
    ] = None
    project: Annotated[
        str | None,
        typer.Option(
            help="Project (wandb, trackio) or experiment (mlflow) of the run. Default: the "
            "tracker's own setting, else logratio.",
            rich_help_panel=WATCHING_PANEL,
        ),
    ] = None
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Write report.html in --output during the run and at its end; with pictures if "
            "matplotlib is installed.",
            rich_help_panel=WATCHING_PANEL,
        ),
    ] = True


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of full fine-tuning."""

    lora: Annotated[
        bool,
        typer.Option(
            "--lora",
            help="Train low-rank adapters; the base model without them is the reference.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = False
    lora_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the adapters. Default: 16.", rich_help_panel=LORA_PANEL),
    ] = None
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="The scale is alpha / rank. Default: 32.", rich_help_panel=LORA_PANEL),
    ] = None
    lora_target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME…",
            help="Names of the modules to adapt; several may follow. Default: every linear layer "
            "except the head.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = None

    lora_dropout: Annotated[
        float | None,
        typer.Option(
            help="Probability that an input of an adapter is dropped in training. Default: 0.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = None
    lora_rslora: Annotated[
        bool,
        typer.Option(
            "--lora-rslora",
            help="The scale is alpha / √rank (rank-stabilized LoRA).",
            rich_help_panel=LORA_PANEL,
        ),
    ] = False
    lora_dora: Annotated[
        bool,
        typer.Option(
            "--lora-dora",
            help="Train the norm of each row of a weight apart from its direction (DoRA).",
            rich_help_panel=LORA_PANEL,
        ),
    ] = False
    lora_modules_to_save: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME…",
            help="Names of further layers to train whole, such as lm_head, embed_tokens or norm; "
            "several may follow.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = None
    lora_init: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How adapters start: default, gaussian or orthogonal.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = None
    lora_config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read all settings of the adapters from peft's adapter_config.json, instead of "
            "--lora and its flags.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = None
    adapter: Annotated[
        StartAdapter,
        typer.Option(
            help="If --model is an adapter: merge it and train all weights, or continue to train "
            "the adapter; the reference is then the adapter at its start.",
            rich_help_panel=LORA_PANEL,
        ),
    ] = StartAdapter.MERGE

    def settings(self) -> "LoraSettings | None":
        """Return the settings of new adapters, or None without --lora and --lora-config.

        Raises:
            ConfigError: A LoRA flag is given without --lora or with --lora-config, or the file of
                --lora-config is not supported.
        """
        from logratio.training.config import LoraSettings
        from logratio.training.lora import read_lora_config

        given = {name: getattr(self, flag) for name, flag in LORA_FLAGS.items()}
        # A 0 is a value, which the settings check.
        chosen = {n: v for n, v in given.items() if v is not None and v is not False and v != []}
        flags = [LORA_FLAGS[name].replace("_", "-") for name in chosen]
        if self.lora_config:
            if flags:
                raise ConfigError(f"{flags[0]} and lora-config: give one of them")
            return read_lora_config(self.lora_config)
        if chosen and not self.lora:
            raise ConfigError(f"--{flags[0]} is given without --lora")
        return LoraSettings(**chosen) if self.lora else None


LORA_FLAGS = {
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "targets": "lora_target",
    "dropout": "lora_dropout",
    "use_rslora": "lora_rslora",
    "use_dora": "lora_dora",
    "modules_to_save": "lora_modules_to_save",
    "init": "lora_init",
}
"""Settings of adapters, and the flags that set them."""


@dataclass(frozen=True)
class Machine(Settings):
    """Device, precision and memory."""

    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens per micro-batch. A lower value saves memory and leaves the results "
            "unchanged. Default: 2,048 on a CPU, 8,192 on a GPU.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    activation_checkpointing: Annotated[
        ActivationCheckpointing,
        typer.Option(
            help="Layers that recompute their activations in the backward pass: auto, as many as "
            "memory requires; off, none; all. Results are unchanged.",
            rich_help_panel=options.MACHINE,
        ),
    ] = ActivationCheckpointing.AUTO
    offload_activations: Annotated[
        bool,
        typer.Option(
            "--offload-activations",
            help="Keep activations in host memory until the backward pass: saves GPU memory, costs "
            "two copies over the bus. Results are unchanged.",
            rich_help_panel=options.MACHINE,
        ),
    ] = False
    share_beginnings: options.ShareBeginnings = False
    compile_layers: Annotated[
        Compile,
        typer.Option(
            "--compile",
            help="Compile the decoder layers (torch.compile), which takes up to a minute. auto: "
            "time both, and compile if that is faster.",
            rich_help_panel=options.MACHINE,
        ),
    ] = Compile.OFF
    precision: options.PrecisionOption = None
    quantization: Annotated[
        options.Quantization | None,
        typer.Option(
            help="Load the base of the adapters, and the reference, in 8 or 4 bits (QLoRA, "
            "bitsandbytes). Needs --lora or --adapter continue.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    optimizer: Annotated[
        OptimizerName,
        typer.Option(
            help="adamw8bit: moments in 8 bits (bitsandbytes), not exact. adamw-host: exact, state "
            "in host memory, slower by two copies of the weights per update.",
            rich_help_panel=options.MACHINE,
        ),
    ] = OptimizerName.ADAMW
    read_mode: options.ReadModeOption = ReadMode.MAP
    parallel: Annotated[
        Parallel,
        typer.Option(
            help="How several processes (torchrun) hold the model. ddp: each a whole one. fsdp: "
            "each a shard of every weight. hsdp: sharded within a host, replicated across hosts. "
            "auto: ddp if it fits. Results are unchanged but for rounding.",
            rich_help_panel=options.MACHINE,
        ),
    ] = Parallel.AUTO
    context_parallel_size: Annotated[
        int,
        typer.Option(
            help="Processes that compute each micro-batch together, each with a part of every "
            "prompt, for prompts that do not fit on one GPU.",
            min=1,
            rich_help_panel=options.MACHINE,
        ),
    ] = 1
    async_save: Annotated[
        bool | None,
        typer.Option(
            help="Write checkpoints of a sharded model while the run goes on, from a copy in host "
            "memory. Default: on GPUs.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None
    stall_timeout: options.StallTimeout = None
    device: options.Device = None


UPDATE, HELD_OUT, LORA, MACHINE, WATCHING = Update(), HeldOut(), Lora(), Machine(), Watching()
"""The defaults."""
