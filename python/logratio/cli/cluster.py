"""`logratio train --dry-run --world-size N`: the forecast for a cluster of GPUs."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli.options import Settings

if TYPE_CHECKING:
    from logratio.training.cluster import Cluster, ClusterForecast

PANEL = "Planning a cluster, with --dry-run"


@dataclass(frozen=True)
class ClusterFlags(Settings):
    """The GPUs to plan for; the fields of `logratio.training.Cluster`."""

    world_size: Annotated[
        int | None,
        typer.Option(
            help="Number of GPUs. The model's folder needs no weights, and this machine no GPU.",
            rich_help_panel=PANEL,
        ),
    ] = None
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="h100, h200, b200, a100, h100-pcie, l40s, l4, a40, a10; or cpu: this machine's "
            "CPU, which is measured for some seconds. Default: h100.",
            rich_help_panel=PANEL,
        ),
    ] = None
    gpus_per_host: Annotated[
        int | None, typer.Option(help="GPUs per host. Default: 8.", rich_help_panel=PANEL)
    ] = None
    compute_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the GPU's peak that products reach. Default: 0.43.",
            rich_help_panel=PANEL,
        ),
    ] = None
    link_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the bandwidth that collectives reach. Default: 0.67 in a host, 0.8 "
            "between hosts.",
            rich_help_panel=PANEL,
        ),
    ] = None
    network_gbps: Annotated[
        float | None,
        typer.Option(
            help="Gb/s of the network per GPU. Default: 400 for H100, H200 and B200, 200 for "
            "A100, else 100.",
            rich_help_panel=PANEL,
        ),
    ] = None

    def cluster(self, *, dry_run: bool, to_file: bool) -> "Cluster | None":
        """Return the cluster to plan for, or None without --world-size.

        Args:
            dry_run: Whether --dry-run is given.
            to_file: Whether --json is given.

        Raises:
            ConfigError: A flag has no effect without another, or is invalid.
        """
        from logratio.errors import ConfigError
        from logratio.training.cluster import Cluster

        given = {name: value for name, value in self.settings().items() if value is not None}
        if self.world_size is None:
            if given or to_file:
                flag = next(iter(given), "json").replace("_", "-")
                raise ConfigError(f"--{flag} plans a cluster: give --world-size too")
            return None
        if not dry_run:
            raise ConfigError("--world-size plans a cluster, and starts nothing: add --dry-run")
        return Cluster(**given)


CLUSTER = ClusterFlags()
"""The defaults."""


def print_forecast(found: "ClusterForecast") -> None:
    """Print the forecast as tables, with what limits the run and what would help."""
    from rich.console import Console
    from rich.table import Table

    from logratio.forecast import count, duration, size

    where = f"{count(found.world_size, 'GPU')} on {count(found.hosts, 'host')}"
    typer.echo(
        f"{_parameters(found.parameters)} parameters on {where}: {found.gpu}, "
        f"{found.mode}, {_checkpointing(found.layers_twice)}"
    )
    if found.why:
        typer.echo(found.why)
    memory = Table("memory of a GPU", "")
    for name, taken in asdict(found.memory).items():
        if name != "loading":
            memory.add_row(name, size(taken))
    if found.memory.loading:
        memory.add_row("all of it while the model is loaded", size(found.memory.loading))
    verdict = "fits" if found.fits else "does not fit"
    memory.add_row(f"total ({verdict})", f"{size(found.memory.bytes)} of {size(found.capacity)}")
    time = Table("time of an update", "")
    for label, seconds in _times(found):
        time.add_row(label, f"{seconds:.3g} s")
    console = Console()
    console.print(memory, time)
    typer.echo(
        f"{found.tokens_per_second:,.0f} tokens/s, {found.pairs_per_second:,.1f} pairs/s, "
        f"{found.pairs_per_gpu_hour:,.0f} pairs per GPU-hour, MFU {found.mfu:.0%}"
    )
    hours = found.updates * found.time.seconds
    typer.echo(
        f"{count(found.updates, 'update')}: {duration(hours)}, {found.gpu_hours:,.1f} GPU-hours; "
        f"limited by {found.limit}"
    )
    for sentence in found.advice:
        typer.echo(sentence)


def _parameters(number: int) -> str:
    if number < 1e9:
        return f"{number / 1e6:,.2f} million"
    return f"{number / 1e9:,.2f} billion"


def _checkpointing(layers: int) -> str:
    from logratio.forecast import count

    return f"{count(layers, 'layer')} computed twice" if layers else "no layer computed twice"


def _times(found: "ClusterForecast") -> list[tuple[str, float]]:
    time = found.time
    return [
        ("products", time.compute),
        ("waiting for the slowest rank", time.waiting),
        (f"collectives, exposed (of {time.gather + time.reduce:.3g} s)", time.exposed),
        ("optimizer", time.optimizer),
        ("total", time.seconds),
    ]
