"""`logratio merge`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from logratio.cli import options


class Dtype(StrEnum):
    """Dtype of the written weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def merge(
    model: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the whole model; must not exist, or be empty.")
    ],
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the weights. auto: that of the base's files.")
    ] = Dtype.AUTO,
    device: options.Device = None,
) -> None:
    """Merge an adapter into its base, and write a whole model.

    The weights are added in float32 and rounded once. The written model is compared with the
    adapter on fixed random sequences; if they differ by more than rounding explains, nothing is
    written.
    """
    from logratio.progress import say
    from logratio.training.merging import merge_adapter

    result = merge_adapter(model, output, dtype=dtype.value, device=device)
    if result.quantization:
        say(
            f"the adapter was trained over a base in {result.quantization}, and is merged into the "
            "base without quantization: log-probs differ from those of the training"
        )
    typer.echo(
        f"largest difference of a log-prob from the adapter's: {result.largest_gap:.2g} nats "
        f"({result.tokens} tokens)"
    )
    typer.echo(f"whole model, weights in {result.dtype}: {result.output}")
