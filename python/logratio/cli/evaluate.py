"""`logratio evaluate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logratio.cli import options
from logratio.cli.bundle import Base
from logratio.cli.config import takes_config
from logratio.cli.options import READING, Reading, Settings, takes_flags
from logratio.cli.train import announce
from logratio.errors import ConfigError

if TYPE_CHECKING:
    from logratio.data.analysis.evaluation_result import Evaluation
    from logratio.training.config import EvaluateConfig


@dataclass(frozen=True)
class Sampling(Settings):
    """Completions that are sampled from the policy."""

    samples: Annotated[
        int,
        typer.Option(
            help="Completions to sample from the policy to estimate its KL to the reference, which "
            "held-out pairs cannot estimate."
        ),
    ] = 0
    samples_file: Annotated[
        Path | None,
        typer.Option(
            help="Write the prompts and the samples of policy and reference to this file, as JSON "
            "lines."
        ),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(help="Longest sampled completion.")] = 128
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0


SAMPLING = Sampling()
BUDGET = 16384
"""Default tokens per forward pass."""


Policy = Annotated[
    Path | None, typer.Option(help="Folder or id of the trained model, adapter or reward model.")
]
Bundle = Annotated[
    Path | None,
    typer.Option(
        help="Instead of --policy: a bundle written by `logratio export`, which needs neither a "
        "reference nor torch and has its own tokenizer, rules and β."
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        help="Folder or id of the reference model. Needed unless the policy is a reward model."
    ),
]


_HAS = "the bundle has its own models and β"
_WRITES = "a bundle cannot write completions"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("policy", "reference", "beta"), _HAS),
    **dict.fromkeys(("samples", "samples_file", "max_new_tokens", "seed"), _WRITES),
    **dict.fromkeys(
        ("device", "precision"), "ONNX Runtime computes it on the CPU, in the bundle's precision"
    ),
    "token_budget": "the reranker divides the pairs into runs of a fixed size",
    "share_beginnings": "its graph shares a prompt only between the answers of one pair, if at all",
}
"""Settings of models in torch that `--bundle` refuses, and why."""


@takes_config("EvaluateConfig")
@takes_flags
def evaluate(
    data: options.Data,
    policy: Policy = None,
    bundle: Bundle = None,
    base: Base = None,
    reference: Reference = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Reward per nat of log-ratio. Default: β of the policy's training."),
    ] = None,
    sampling: Sampling = SAMPLING,
    json_file: options.JsonFile = None,
    reading: Reading = READING,
    token_budget: Annotated[
        int,
        typer.Option(help="Tokens per forward pass. A lower value saves memory and leaves the "
                     "results unchanged.", rich_help_panel=options.MACHINE),
    ] = BUDGET,
    share_beginnings: options.ShareBeginnings = False,
    precision: options.PrecisionOption = None,
    device: options.Device = None,
    dry_run: options.DryRun = False,
) -> None:  # fmt: skip
    """Measure a policy or a bundle on held-out pairs: accuracy, margin, calibration, KL."""
    if bundle is not None:
        given = {"policy": policy, "reference": reference, "beta": beta, "device": device}
        given |= {"precision": precision, "share_beginnings": share_beginnings or None}
        given |= {"token_budget": None if token_budget == BUDGET else token_budget}
        _refuse_of_bundle(given | _changed(sampling), reading)
        _evaluate_bundle((bundle, base), data, reading, json_file, dry_run)
        return
    if base is not None:
        raise ConfigError("--base is for --bundle")
    if policy is None:
        raise ConfigError("--policy is missing: give a trained model, or --bundle")
    from logratio.training.config import EvaluateConfig

    config = EvaluateConfig(
        policy,
        reference,
        data,
        beta=beta,
        **sampling.settings(),
        token_budget=token_budget,
        share_beginnings=share_beginnings,
        precision=precision.value if precision else None,
        device=device,
        rules=reading.rules,
        formats=reading.settings(),
        max_bad_fraction=reading.max_bad_fraction,
    )
    _evaluate_policy(config, json_file, dry_run)


def _changed(sampling: Sampling) -> dict[str, object]:
    """Return the settings of sampling; those with their default are None."""
    before = SAMPLING.settings()
    return {
        name: None if value == before[name] else value
        for name, value in sampling.settings().items()
    }


def _evaluate_policy(config: "EvaluateConfig", json_file: Path | None, dry_run: bool) -> None:
    from logratio.forecast import check_writable
    from logratio.training.evaluation import prepare

    ready = prepare(config)
    if not ready.processes.is_first:
        if not dry_run:
            ready.run()
        return
    if json_file and not options.is_stdout(json_file):
        check_writable(json_file.parent)
    announce(ready.dataset, ready.forecast)
    if not dry_run:
        _show(ready.run(), json_file)


def _show(result: "Evaluation", json_file: Path | None) -> None:
    """Print the results, and write them to the file of `--json`."""
    if not options.is_stdout(json_file):
        _print_evaluation(result)
    if json_file:
        options.write_json(json_file, result.to_dict())


def _refuse_of_bundle(given: Mapping[str, object], reading: Reading) -> None:
    """Refuse settings that a bundle has itself, or cannot have."""
    changed: dict[str, list[str]] = {}
    for name, value in given.items():
        if value is not None:
            changed.setdefault(REFUSED[name], []).append(f"--{name.replace('_', '-')}")
    if changed:
        parts = (f"remove {', '.join(flags)}: {why}" for why, flags in changed.items())
        raise ConfigError(f"with --bundle, {'; '.join(parts)}")
    if reading.rules != READING.rules:
        raise ConfigError(
            "--bundle has its own tokenization rules: remove the flags that change them, such as "
            "--max-length"
        )


def _evaluate_bundle(
    folders: tuple[Path, Path | None],
    data: list[Path],
    reading: Reading,
    json_file: Path | None,
    dry_run: bool,
) -> None:
    from logratio.bundle import read_manifest
    from logratio.data.analysis.report import analyse
    from logratio.forecast import check_writable
    from logratio.serving.bundle_evaluation import bundle_pairs, evaluate_bundle
    from logratio.serving.reranker import Reranker
    from logratio.serving.shared_base import check_base

    if json_file and not options.is_stdout(json_file):
        check_writable(json_file.parent)
    bundle, base = folders
    check_base(bundle, read_manifest(bundle), base)
    store, report = bundle_pairs(
        bundle, data, formats=reading.settings(), max_bad_fraction=reading.max_bad_fraction
    )
    typer.echo(analyse(store, report).to_summary(), err=True)
    if dry_run:
        return
    _show(evaluate_bundle(Reranker.load(bundle, base=base), store), json_file)


def _print_evaluation(result: "Evaluation") -> None:
    from rich.console import Console
    from rich.table import Table

    from logratio.forecast import count
    from logratio.intervals import spread

    table = Table("held-out", count(result.pairs, "pair"))
    low, high = result.accuracy_interval
    table.add_row("preference accuracy", f"{result.accuracy:.3f} (95 %: {low:.3f} to {high:.3f})")
    beta = "" if result.beta is None else f" (β {result.beta:g})"
    table.add_row(f"reward margin{beta}", f"{result.margin:.4f}")
    if result.logratio_chosen is None:
        table.add_row("score chosen", f"{result.reward_chosen:.3f}")
        table.add_row("score rejected", f"{result.reward_rejected:.3f}")
    else:
        table.add_row("log-ratio chosen", f"{result.logratio_chosen:.3f} nats")
        table.add_row("log-ratio rejected", f"{result.logratio_rejected:.3f} nats")
    table.add_row("length chosen", f"{result.length_chosen:.1f} tokens")
    table.add_row("length rejected", f"{result.length_rejected:.1f} tokens")
    table.add_row("calibration error", f"{result.calibration.expected_error:.3f}")
    if result.kl:
        error = spread(result.kl.standard_error)
        shown = f"{result.kl.nats:.2f}{error} nats{error and ' (95 %)'}"
        table.add_row("KL to the reference", shown)
        table.add_row("length of samples", f"{result.kl.mean_length:.1f} tokens")
    if len(result.sources) > 1:
        for name, (pairs, accuracy) in result.sources.items():
            table.add_row(f"accuracy of {name}", f"{accuracy:.3f} ({count(pairs, 'pair')})")
    Console().print(table)
