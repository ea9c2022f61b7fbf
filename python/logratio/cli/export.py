"""`logratio export`, `rank` and `demo`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logratio.cli.bundle import AllowedSigners, Base, Expect, LoadSeconds
from logratio.cli.options import DryRun, Settings, read_text_as, takes_flags

if TYPE_CHECKING:
    from logratio.serving.rank_rows import RankSummary

Bundle = Annotated[Path, typer.Option(help="Bundle folder written by `logratio export`.")]


@dataclass(frozen=True)
class Loading(Settings):
    """How a bundle is loaded."""

    provider: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime execution provider, such as CUDAExecutionProvider. Default: CPU."
        ),
    ] = None
    allow_fallback: Annotated[
        bool,
        typer.Option(
            "--allow-fallback",
            help="Use the CPU if the requested execution provider is not available.",
        ),
    ] = False
    expect: Expect = None
    allowed_signers: AllowedSigners = None
    load_seconds: LoadSeconds = 300.0
    base: Base = None
    cache: Annotated[
        Path | None,
        typer.Option(
            help="For a bundle exported with `--reference cached`: the cache of `logratio "
            "precompute` with the reference's log-probs of the candidates."
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `Reranker.load`."""
        settings = self.settings()
        provider = settings.pop("provider")
        return settings | {"providers": [provider] if provider else None}


LOADING = Loading()


class Dtype(StrEnum):
    """The type of a bundle's weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Bits(StrEnum):
    """Bits per weight of the matrices."""

    EIGHT = "8"
    FOUR = "4"


@dataclass(frozen=True)
class Smaller(Settings):
    """A precision other than float32, and how it is judged."""

    dtype: Annotated[
        Dtype,
        typer.Option(
            help="float16: the model computes in it. bfloat16: only weights are stored in it."
        ),
    ] = Dtype.FLOAT32
    bits: Annotated[Bits | None, typer.Option(help="Store matrices in 8 or 4 bits per weight.")] = (
        None
    )
    data: Annotated[
        Path | None,
        typer.Option(
            help="Prompts and candidates, as for `logratio rank`, to compare --dtype or --bits "
            "with float32. Default: 24 prompts with 8 candidates, sampled from the policy."
        ),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Export although the rewards differ too much.")
    ] = False

    def settings(self) -> dict[str, Any]:
        """Return the fields of `ExportConfig`."""
        return super().settings() | {"bits": int(self.bits) if self.bits else None}


SMALLER = Smaller()


@takes_flags
def export(
    policy: Annotated[
        Path, typer.Option(help="Folder or id of the trained model, adapter or reward model.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the bundle; must be new or empty.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER|cached|none",
            help="Folder or id of the reference model. `cached`: its log-probs are an input of the "
            "graph. `none`: the reward has no reference, which is the default if the policy was "
            "trained without one (simpo, cpo, orpo). A reward model needs none.",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="The reward is β·(log π − log π_ref). Default: β of the policy's training."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--text",
            help="Whether a prompt given as a string is a user's message, formatted with the chat "
            "template, or plain text. Default: as in the policy's training.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For a LoRA policy: write only its adapter, for the base's bundle in this folder, "
            "which several policies share. Without the folder, it is written first.",
        ),
    ] = None,
    smaller: Smaller = SMALLER,
    dry_run: DryRun = False,
) -> None:
    """Export policy and reference, or a reward model, as one ONNX graph that scores N candidates.

    The prompt is computed once for all candidates. The bundle is written only if onnxruntime's
    log-probs or scores match torch's within 1e-4 + 1e-6·|sum| per sequence. In another precision,
    rewards may differ by 0.01 (--dtype), or 99% of the pairs of candidates must keep their order
    and 95% of the prompts their best candidate (--bits).
    """
    from logratio.export.export import export_bundle
    from logratio.export.plan import ExportConfig, plan_export

    text_as = read_text_as(chat)
    config = ExportConfig(
        policy, reference, output, beta, text_as=text_as, base=base, **smaller.settings()
    )
    typer.echo(plan_export(config).to_text(), err=True)
    if not dry_run:
        typer.echo(export_bundle(config).to_text())


@takes_flags
def rank(
    bundle: Bundle,
    input_file: Annotated[
        Path,
        typer.Option(
            "--input",
            metavar="FILE",
            help='Rows {"prompt": text or chat messages, "candidates": [text, …]}: JSON lines, '
            "Parquet or another type that --data reads; - for standard input.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with rewards and order, or Parquet if the name ends in .parquet. The "
            "same command continues an interrupted one. Default: standard output."
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that each load the bundle and share the CPUs; with CUDA, each has "
            "another GPU.",
        ),
    ] = 1,
    loading: Loading = LOADING,
    dry_run: DryRun = False,
) -> None:
    """Rank candidates by their implicit reward, without torch.

    A reward is defined up to a constant per prompt, so compare only candidates of the same prompt.
    A row that cannot be ranked gets an `error`, and a candidate without a reward is under `errors`.
    The command exits with 1 if a row has no reward at all.
    """
    from logratio.one_process import refuse_multiple_processes
    from logratio.serving.rank_file import rank_file, rank_forecast
    from logratio.serving.rank_workers import Workers
    from logratio.serving.reranker import Reranker

    refuse_multiple_processes("rank")
    forecast = rank_forecast(bundle, input_file, output, workers, base=loading.base)
    typer.echo(forecast.to_text(), err=True)
    if dry_run:
        return
    settings = loading.arguments()
    several = workers > 1
    reranker = Workers(bundle, workers, settings) if several else Reranker.load(bundle, **settings)
    with _ranking(input_file) as progress:
        summary = rank_file(reranker, input_file, output, progress=progress)
    typer.echo(summary.to_text(), err=True)
    if summary.unranked:
        raise typer.Exit(1)


@contextmanager
def _ranking(input_file: Path) -> Iterator[Callable[["RankSummary", int, int], None]]:
    """Show the progress of ranking: the part of the file, and candidates per second."""
    from logratio.progress import progress

    total = math.inf if str(input_file) == "-" else input_file.stat().st_size
    with progress("ranking", total, "B") as advance:
        start, done, before = time.monotonic(), 0, None

        def report(summary: "RankSummary", position: int, _total: int) -> None:
            nonlocal done, before
            if before is None:  # a continued run has candidates of the earlier one
                before = summary.candidates
            rate = (summary.candidates - before) / max(time.monotonic() - start, 1e-9)
            advance(position - done, f"{summary.candidates:,} candidates, {rate:,.0f}/s")
            done = position

        yield report


def demo(
    output: Annotated[Path, typer.Option(help="Folder for all files.")] = Path("logratio-demo"),
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the data and models; the table differs between machines by "
            "rounding, which training amplifies."
        ),
    ] = 0,
) -> None:
    """Run every step on generated data, in minutes on a CPU, and print the results."""
    from logratio.demo.report import show
    from logratio.demo.run import DemoConfig
    from logratio.one_process import refuse_multiple_processes

    refuse_multiple_processes("demo")
    show(DemoConfig(output=output, seed=seed))
