"""`logratio methods`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logratio.errors import ConfigError

if TYPE_CHECKING:
    from logratio.training.methods.method import Method


def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="METHOD", help="Show everything about one method."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """List the methods that `train --loss` takes: their data, reference, β and options.

    `logratio methods METHOD` adds the formula, the initial value and the paper; so does `--json`.
    """
    from logratio.training.methods.table import METHODS, MIXTURES

    if name in MIXTURES:
        typer.echo(f"{name}: --loss {_mixture(MIXTURES[name])}")
        return
    if name is not None and name not in METHODS:
        raise ConfigError(f"no method is called {name!r}; choose from {', '.join(METHODS)}")
    chosen = {name: METHODS[name]} if name else METHODS
    if as_json:
        _print_json(chosen)
        return
    if name:
        _print_one(name, METHODS[name])
        return
    _print_table(chosen)
    for mixture, weights in MIXTURES.items():
        typer.echo(f"{mixture}: --loss {_mixture(weights)}")
    typer.echo("formula, initial value and paper: `logratio methods METHOD`, or --json for all")


def _mixture(weights: Mapping[str, float]) -> str:
    return "+".join(f"{one}:{share:g}" for one, share in weights.items())


def _print_json(chosen: "dict[str, Method]") -> None:
    import json

    typer.echo(json.dumps({name: _described(method) for name, method in chosen.items()}, indent=2))


def _described(method: "Method") -> dict[str, Any]:
    return {
        "title": method.title,
        "data": method.data,
        "reference": method.needs_reference,
        "bad_turns": method.bad_turns,
        "beta": method.beta,
        "initial_value": method.default_initial_value,
        "options": {
            name: {"default": option.default, "range": option.range, "meaning": option.meaning}
            for name, option in method.options.items()
        },
        "formula": method.formula,
        "paper": method.paper,
        "note": method.note,
    }


def _print_table(chosen: "dict[str, Method]") -> None:
    """Print the columns that fit 80 characters, so that none is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = ("--loss", "data", "reference", "β", "options")
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, method in chosen.items():
        table.add_row(
            name,
            method.data,
            "yes" if method.needs_reference else "no",
            _number(method.beta),
            "\n".join(f"{key}={option.default:g}" for key, option in method.options.items()),
        )
    Console().print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _print_one(name: str, method: "Method") -> None:
    rows = {
        "method": f"{method.title} (--loss {name})",
        "loss": method.formula,
        "data": method.data,
        "reference": "needed" if method.needs_reference else "none",
        "bad turns": "weights below 0" if method.bad_turns else "refused",
        "β": _number(method.beta) or "none",
        "initial value": _number(method.default_initial_value) or "depends on the data",
        "paper": method.paper,
        "note": method.note,
    }
    for key, option in method.options.items():
        rows[key] = f"{option.meaning}; {option.range}, default {option.default:g}"
    for key, value in rows.items():
        if value:
            typer.echo(f"{key}: {value}")
