"""Flags of the objective of a run: the method, its numbers, and where the reference comes from."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from logratio.cli.options import Settings
from logratio.errors import ConfigError


@dataclass(frozen=True)
class ReferenceSource(Settings):
    """Where the reference's log-probs come from."""

    cache: Annotated[
        Path | None,
        typer.Option(help="Reference log-probs made by `precompute`; saves the reference model."),
    ] = None
    precompute: Annotated[
        bool, typer.Option("--precompute", help="First compute the log-probs missing in --cache.")
    ] = False
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder or id of the reference model. Default: --model itself."),
    ] = None


@dataclass(frozen=True)
class Objective(Settings):
    """The loss and its parameters."""

    loss: Annotated[
        list[str],
        typer.Option(
            metavar="METHOD[:WEIGHT]",
            help="The method (`logratio methods` lists them), or MODULE:FUNCTION, a loss of your "
            "own. Repeat the flag to add losses with weights: --loss dpo:1 --loss sft:0.2.",
        ),
    ] = field(default_factory=lambda: ["dpo"])
    beta: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL term: a larger one keeps the policy closer to the reference. "
            "Default: that of the method, such as 0.1 for dpo and 2 for simpo."
        ),
    ] = None
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            help="Assumed probability that a label is flipped. Default: that of the method."
        ),
    ] = None
    gamma: Annotated[
        float | None, typer.Option(help="Target margin of simpo and alpha-po. Default: 1.")
    ] = None
    sync_reference: Annotated[
        bool,
        typer.Option(
            "--sync-reference",
            help="Let the reference follow the policy (TR-DPO); without --cache and adapters.",
        ),
    ] = False
    reference_mixup_alpha: Annotated[
        float, typer.Option(help="Weight of the policy in the new reference; 1 replaces it.")
    ] = 0.6
    reference_sync_steps: Annotated[
        int, typer.Option(help="Updates between two changes of the reference.")
    ] = 512
    study_flipped_labels: Annotated[
        float,
        typer.Option(help="For study: share of the groups whose labels are exchanged in training."),
    ] = 0.0
    study_uniform_reference: Annotated[
        bool,
        typer.Option(
            "--study-uniform-reference",
            help="For study: a reference that gives every token the same probability.",
        ),
    ] = False
    loss_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="Another number of the method, such as penalty=50 for dpop: see "
            "`logratio methods`. Repeat the flag, or separate by commas.",
        ),
    ] = None
    router_aux_loss_coef: Annotated[
        float | None,
        typer.Option(
            help="Weight of the router's load-balancing loss of a mixture of experts; 0: none. "
            "Default: that of the model's config if it sets output_router_logits, else 0."
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the config's fields.

        Raises:
            ConfigError: A --loss-option is malformed.
        """
        found = super().settings()
        return found | {"loss_options": _numbers(found.pop("loss_option") or ())}


def _numbers(given: Iterable[str]) -> dict[str, float]:
    """Parse options written as NAME=NUMBER."""
    numbers: dict[str, float] = {}
    for word in (word for words in given for word in words.split(",")):
        name, number = _number(word)
        if name in numbers:
            raise ConfigError(f"--loss-option {name} is given twice")
        numbers[name] = number
    return numbers


def _number(word: str) -> tuple[str, float]:
    """Return the name and the number of "penalty=50"."""
    name, equals, value = word.partition("=")
    try:
        number = float(value)
    except ValueError:
        equals = ""
    if not (name and equals):
        raise ConfigError(f"--loss-option {word!r}: write it as penalty=50")
    return name.strip(), number


SOURCE, OBJECTIVE = ReferenceSource(), Objective()
"""The defaults."""
