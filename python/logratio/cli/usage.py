"""Errors in flags and arguments, as one sentence in the words of the settings."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import typer

from logratio.synonyms import SAME, nearest

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The base class of typer's errors in flags and arguments, which typer does not export."""

_KINDS = {"number": "a number", "float": "a number", "integer": "a whole number"}
_KINDS |= {"int": "a whole number", "boolean": "true or false", "bool": "true or false"}
_LIMITS = {"greater than or equal to": "at least", "less than or equal to": "at most"}
_LIMITS |= {"greater than": "above", "less than": "below"}


def usage_message(error: Any, arguments: Sequence[str], flags: Collection[str]) -> str:
    """Return the message for an error in flags or arguments.

    Args:
        error: The exception of typer.
        arguments: The command line.
        flags: The flags of the command.
    """
    context = error.ctx
    advice = f" (see `{context.command_path} --help`)" if context else ""
    if (unknown := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        near = nearest_flag(unknown, flags)
        return f"no option {unknown}" + (f": did you mean {near}?" if near else advice)
    parameter = getattr(error, "param", None)
    if parameter is None or not error.message:
        text = str(error.format_message()).rstrip(".")
        return text[:1].lower() + text[1:] + advice
    name = max(parameter.opts, key=len) if parameter.opts[0].startswith("-") else parameter.metavar
    given = _value_of(parameter.opts, arguments)
    return f"{name} must be {_wanted(error.message)}" + (f", not {given!r}" if given else "")


def nearest_flag(given: str, flags: Collection[str]) -> str | None:
    """Return the flag that `given` probably misspells, under its name here or elsewhere."""
    accepted = [flag for flag, own in SAME.items() if own in flags]
    names = [flag for flag in (*flags, *accepted) if flag.startswith("--")]
    plain = given.lstrip("-").replace("_", "-").lower()
    near = nearest(plain, [name[2:] for name in names])
    return near and f"--{near}"


def _value_of(flags: Sequence[str], arguments: Sequence[str]) -> str | None:
    """Return the value of a flag that is given once."""
    values = [
        value if equals else "".join(arguments[at + 1 : at + 2])
        for at, argument in enumerate(arguments)
        for flag, equals, value in [argument.partition("=")]
        if flag in flags
    ]
    return values[0] if len(values) == 1 else None


def _wanted(message: str) -> str:
    """Return the allowed values of a parameter, from typer's complaint about another value."""
    message = message.removeprefix("Value error, ").rstrip(".")
    if found := re.search(r"valid (\w+)", message):
        return _KINDS.get(found[1], f"a {found[1]}")
    if found := re.search(r"is not one of (.+)", message, re.DOTALL):
        return "one of " + " ".join(found[1].replace("'", "").split())
    if found := re.search(r"should be (.+ than(?: or equal to)?) (\S+)", message):
        return f"{_LIMITS.get(found[1], found[1])} {found[2]}"
    return message[:1].lower() + message[1:]
