"""Check the fields of settings dataclasses against their annotations.

A dataclass calls `check_fields` in its ``__post_init__``; its annotations are the only description
of the allowed values.
"""

import math
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from logratio.errors import ConfigError, SettingTypeError
from logratio.setting_names import flag_of

_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a Path",
    type(None): "None",
}

PATH = str | Path
"""The type of an argument that is a path."""


@dataclass(frozen=True)
class Converted:
    """In ``Annotated[T, Converted(f)]``: the field is set to ``f(value)``."""

    by: Callable[[Any], Any]

    def __repr__(self) -> str:
        return f"Converted({self.by.__name__})"


@dataclass(frozen=True)
class Range:
    """In ``Annotated[float, Range(0, 1)]``: the finite numbers that a field allows.

    Attributes:
        low: The smallest number, or the limit if it is excluded; None: no limit.
        high: The largest number, or the limit if it is excluded; None: no limit.
        without_low: Whether `low` itself is excluded.
        without_high: Whether `high` itself is excluded.
    """

    low: float | None = None
    high: float | None = None
    without_low: bool = False
    without_high: bool = False

    def has(self, number: float) -> bool:
        """Whether a number is in the range."""
        if not math.isfinite(number):
            return False
        if number in (self.low, self.high):
            return not (self.without_low if number == self.low else self.without_high)
        return (self.low is None or number > self.low) and (self.high is None or number < self.high)

    def __repr__(self) -> str:
        return f"Range({self})"

    def __str__(self) -> str:
        low = f"{'above' if self.without_low else 'at least'} {self.low}"
        high = f"{'below' if self.without_high else 'at most'} {self.high}"
        limits = [text for text, at in ((low, self.low), (high, self.high)) if at is not None]
        return " and ".join(limits) or "finite"


def check_kind(settings: object, kind: type) -> None:
    """Check that settings are of a class, and not for example a dict.

    Raises:
        SettingTypeError: They are of another class.
    """
    if not isinstance(settings, kind):
        name, given = kind.__name__, type(settings).__name__
        hint = f": write {name}(**settings)" if isinstance(settings, Mapping) else ""
        raise SettingTypeError(f"expected a {name}, not a {given}{hint}")


class _MisfitError(Exception):
    """A value does not match an annotation."""


class _OutsideError(Exception):
    """A number is outside the range of an annotation."""

    def __init__(self, allowed: Range, given: float) -> None:
        super().__init__(f"must be {allowed}, not {given}")


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Converts int to float, list to tuple, and numpy scalars to Python scalars, as annotated. Nothing
    else is converted: "1e-4" is not a number, True is not an int, and a string is not a list.

    Args:
        settings: The dataclass instance; converted values are stored in it.

    Raises:
        SettingTypeError: A field has the wrong type.
        ConfigError: A string is not one of the allowed values of a field, or a number is outside
            the range of its field.
    """
    for field in fields(settings):
        given = getattr(settings, field.name)
        fitted = fitted_field(type(settings), field.name, given)
        if fitted is not given:
            object.__setattr__(settings, field.name, fitted)


def fitted_field(kind: type, name: str, given: Any) -> Any:
    """Return a value as the field `name` of a dataclass holds it.

    Raises:
        SettingTypeError, ConfigError: As raised by `check_fields`.
    """
    hint = _hints(cast(Hashable, kind))[name]
    flag = flag_of(kind.__name__, name)
    try:
        return _fitted(hint, given)
    except _MisfitError:
        raise _refusal(name, flag, hint, given) from None
    except _OutsideError as error:
        raise ConfigError(f"{flag} {error}") from None
    except SettingTypeError as error:  # raised by the annotation's converter
        raise SettingTypeError(f"{name}: {error}") from None


def check_argument(name: str, hint: Any, given: Any) -> None:
    """Check an argument of a call, which has no dataclass, against a type.

    Raises:
        SettingTypeError: It has another type; the message names the argument.
    """
    try:
        _fitted(hint, given)
    except _MisfitError:
        raise _refusal(name, name, hint, given) from None


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _refusal(name: str, flag: str, hint: Any, given: Any) -> SettingTypeError | ConfigError:
    """Return the error for a value of another type, or for another word than the allowed ones.

    A flag has always a value of its type, so an error of types names the field.
    """
    taken = f"must be {_words(hint)}, not {given!r}"
    if isinstance(given, str) and any(get_origin(kind) is Literal for kind in _choices(hint)):
        return ConfigError(f"{flag} {taken}")
    return SettingTypeError(f"{name} {taken} ({with_article(type(given).__name__)})")


def _fitted(hint: Any, given: Any) -> Any:
    """Return a value converted to its annotation, or raise `_MisfitError`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return given
    if origin is Annotated:
        converted = [extra.by(given) for extra in arguments[1:] if isinstance(extra, Converted)]
        return converted[0] if converted else _in_range(arguments, given)
    if origin in (Union, types.UnionType):
        return _fitted_to_one(arguments, given)
    if origin is Literal:
        return _fitting(given, any(given == word and type(given) is type(word)
                                   for word in arguments))  # fmt: skip
    if origin in (tuple, list, Sequence):
        return _fitted_items(origin, arguments, given)
    if origin in (Mapping, dict):
        return _fitted_mapping(arguments, given)
    return _fitted_scalar(origin or hint, given)


def _in_range(arguments: Sequence[Any], given: Any) -> Any:
    """Return a value converted to an annotation, whose ranges follow it in `arguments`."""
    fitted = _fitted(arguments[0], given)
    for allowed in arguments[1:]:
        if isinstance(allowed, Range) and not allowed.has(fitted):
            raise _OutsideError(allowed, given)
    return fitted


def _fitted_to_one(hints: Sequence[Any], given: Any) -> Any:
    """Return a value converted to the first annotation that it matches.

    Annotations with a converter come last, because a converter raises its own errors.
    """
    for hint in sorted(hints, key=_is_annotated):
        try:
            return _fitted(hint, given)
        except _MisfitError:
            continue
    raise _MisfitError


def _is_annotated(hint: Any) -> bool:
    return get_origin(hint) is Annotated


def _fitted_items(origin: Any, arguments: tuple[Any, ...], given: Any) -> Any:
    """Return a list or tuple with converted items; a string is neither."""
    _fitting(given, isinstance(given, list | tuple))
    kinds = arguments[:1] * len(given) if origin is not tuple or ... in arguments else arguments
    _fitting(given, len(kinds) == len(given))
    items = [_fitted(kind, item) for kind, item in zip(kinds, given, strict=True)]
    if origin is tuple:
        return tuple(items)
    return given if items == given else items


def _fitted_mapping(arguments: tuple[Any, ...], given: Any) -> Any:
    """Return a mapping with converted keys and values."""
    _fitting(given, isinstance(given, Mapping))
    if not arguments:
        return given
    key, value = arguments
    found = {_fitted(key, name): _fitted(value, one) for name, one in given.items()}
    return given if found == given else found


def _fitted_scalar(kind: Any, given: Any) -> Any:
    is_bool = isinstance(given, bool)
    if kind is float and isinstance(given, Real) and not is_bool:
        return given if isinstance(given, float) else float(given)
    if kind is int and isinstance(given, Integral) and not is_bool:
        return given if isinstance(given, int) else int(given)
    if kind in (int, float):
        raise _MisfitError
    return _fitting(given, isinstance(given, kind))


def _fitting(given: Any, fits: bool) -> Any:
    if not fits:
        raise _MisfitError
    return given


def split_list(text: str) -> list[str]:
    """Return the items of a list that is written with commas, such as "q_proj, v_proj"."""
    return [item.strip() for item in text.split(",") if item.strip()]


def changes(settings: Any) -> str:
    """Return the ``repr`` of a dataclass with the fields that differ from their defaults."""
    given = ((field, getattr(settings, field.name)) for field in fields(settings) if field.repr)
    shown = (f"{field.name}={value!r}" for field, value in given if not _is_default(field, value))
    return f"{type(settings).__qualname__}({', '.join(shown)})"


def _is_default(field: Field[Any], value: Any) -> bool:
    if field.default_factory is not MISSING:
        return bool(value == field.default_factory())
    return (
        field.default is not MISSING
        and type(value) is type(field.default)
        and (bool(value == field.default))
    )


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    if get_origin(hint) is Annotated:
        return _choices(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _words(hint: Any) -> str:
    """Describe the values that an annotation allows."""
    kinds = _choices(hint)
    if len(kinds) > 1:
        *first, last = [_words(kind) for kind in kinds]
        return f"{', '.join(first)} or {last}"
    (kind,) = kinds
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (tuple, list, Sequence):
        return f"a list, each item {_words(arguments[0])}"
    if origin in (Mapping, dict):
        return "a dict"
    return _WORDS.get(kind) or with_article(getattr(kind, "__name__", str(kind)))


def with_article(name: str) -> str:
    """Return a name with "a" or "an" in front."""
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
