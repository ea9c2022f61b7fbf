"""`logratio train`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logratio.cli import options
from logratio.cli.flags import takes_flags
from logratio.cli.options import (
    ActivationCheckpointing,
    OptimizerName,
    Precision,
    ReadMode,
)
from logratio.cli.reading import READING, Reading

if TYPE_CHECKING:
    from logratio.forecast import Forecast
    from logratio.training.config import LoraSettings
    from logratio.training.setup import Dataset

LORA, UPDATE = "LoRA", "Update"


class Loss(StrEnum):
    """The losses of `logratio.training.losses`."""

    DPO = "dpo"
    IPO = "ipo"
    SIMPO = "simpo"
    SFT = "sft"


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
    loss: Annotated[
        Loss, typer.Option(help="sft trains on demonstrations, or on the chosen of pairs.")
    ] = Loss.DPO,
    beta: Annotated[
        float | None,
        typer.Option(help="Weight of the KL term: a larger one keeps the policy closer to the "
                     "reference. Default: 0.1 for dpo and ipo, 2 for simpo."),
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of pairs thought flipped (dpo, simpo).")
    ] = 0.0,
    gamma: Annotated[float, typer.Option(help="The margin that simpo asks for.")] = 1.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=UPDATE)] = 1e-6,
    warmup: Annotated[
        float,
        typer.Option(help="Share of the updates in which the rate rises; then a cosine to 0.",
                     rich_help_panel=UPDATE),
    ] = 0.1,
    max_grad_norm: Annotated[
        float, typer.Option(help="Gradients are scaled to this norm.", rich_help_panel=UPDATE)
    ] = 1.0,
    batch_size: Annotated[
        int, typer.Option(help="Pairs per update, whatever the memory.", rich_help_panel=UPDATE)
    ] = 32,
    epochs: Annotated[int, typer.Option(help="Passes over the data.", rich_help_panel=UPDATE)] = 1,
    mix: Annotated[
        list[float] | None,
        typer.Option(metavar="WEIGHT", help="Of each of --data, in their order; repeat it. An "
                     "epoch draws from them by weight. Default: every record once.",
                     rich_help_panel=UPDATE),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order.", rich_help_panel=UPDATE)] = 0,
    save_every: Annotated[
        int, typer.Option(help="Updates between checkpoints; 0 for none but at an interrupt.",
                          rich_help_panel=UPDATE)
    ] = 200,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest valid checkpoint in --output.",
                           rich_help_panel=UPDATE)
    ] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train low-rank adapters; with them off, the model is "
                           "its own reference.", rich_help_panel=LORA)
    ] = False,
    lora_rank: Annotated[
        int | None, typer.Option(help="Their rank. Default: 16.", rich_help_panel=LORA)
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Scale × rank. Default: 32.", rich_help_panel=LORA)
    ] = None,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="A module's name; repeat it. Default: every linear layer but the head.",
                     rich_help_panel=LORA),
    ] = None,
    reading: Reading = READING,
    token_budget: Annotated[
        int | None,
        typer.Option(help="Tokens computed at a time. Lower it when memory is short: no result "
                     "changes. Default: 2,048 on a CPU, 8,192 on a GPU.",
                     rich_help_panel=options.MACHINE),
    ] = None,
    activation_checkpointing: options.Checkpointing = ActivationCheckpointing.AUTO,
    offload_activations: options.Offload = False,
    compile_layers: options.Compile = False,
    precision: options.PrecisionOption = Precision.FP32,
    optimizer: options.Optimizer = OptimizerName.ADAMW,
    read_mode: options.ReadModeOption = ReadMode.MAP,
    device: options.Device = None,
    dry_run: options.DryRun = False,
) -> None:  # fmt: skip
    """Train a policy on preference pairs.

    Ctrl-C saves a checkpoint and ends; --resume goes on from it, bit for bit. The output folder is
    a model folder for transformers, with metrics.jsonl and TensorBoard's events beside it.
    """
    from logratio.training import TrainConfig
    from logratio.training.trainer import prepare

    settings = _lora(lora, rank=lora_rank, alpha=lora_alpha, targets=lora_target)
    ready = prepare(
        TrainConfig(
            model,
            data,
            output,
            cache=cache,
            read_mode=read_mode.value,
            precompute=precompute,
            reference=reference,
            loss=loss.value,
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            lr=lr,
            warmup=warmup,
            max_grad_norm=max_grad_norm,
            batch_size=batch_size,
            epochs=epochs,
            mix=tuple(mix) if mix else None,
            token_budget=token_budget,
            activation_checkpointing=activation_checkpointing.value,
            offload_activations=offload_activations,
            compile_layers=compile_layers,
            precision=precision.value,
            optimizer=optimizer.value,
            seed=seed,
            save_every=save_every,
            resume=resume,
            device=device,
            lora=settings,
            rules=reading.rules,
            formats=reading.settings(),
            max_bad_fraction=reading.max_bad_fraction,
        )
    )
    announce(ready.dataset, ready.forecast)
    if not dry_run:
        result = ready.run()
        last = result.history[-1] if result.history else {}
        shown = ("loss", "rewards/accuracies", "rewards/margins")
        typer.echo(", ".join(f"{name} {last[name]:.4f}" for name in shown if name in last))
        typer.echo(f"{result.steps} updates; model, metrics and settings: {result.output}")


def _lora(wanted: bool, **given: Any) -> "LoraSettings | None":
    """Return the adapters' settings; refuse settings of adapters that nobody asked for."""
    from logratio.training.config import LoraSettings
    from logratio.training.setup import ConfigError

    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen and not wanted:
        raise ConfigError(f"lora-{next(iter(chosen)).removesuffix('s')} is given without --lora")
    if "targets" in chosen:
        chosen["targets"] = tuple(chosen["targets"])
    return LoraSettings(**chosen) if wanted else None


def announce(dataset: "Dataset", forecast: "Forecast") -> None:
    """Say what was read and what is needed, on standard error: results go to standard output."""
    from logratio.data.analysis import analyse

    report = analyse(dataset.store, dataset.report, tokenizer=dataset.tokenizer).to_text()
    typer.echo(f"{report}\n{forecast.to_text()}", err=True)


__all__ = ["announce", "train"]
