"""Settings as YAML files: every field of a settings dataclass is a key.

A key is the name of a field, or of its flag on the command line (`compile`, `eos`, `lora_rank`),
with "_" or "-"; names of transformers and TRL are accepted as on the command line. The fields of
nested settings (`rules`, `formats`, `lora`) are keys of the file or of a block.

Scalars are read as in YAML 1.2, so ``1e-6`` is a number and ``off`` a word. If that does not fit a
field, ``yes``, ``no``, ``on`` and ``off`` are read as truth values, numbers as text, and one value
as a list of one. Anything else that does not fit is an error with file and line. No tag is
honoured, so no file can create another object.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Self

import yaml

from logratio.errors import ConfigError, LogratioError, MissingInputError
from logratio.setting_names import with_fields
from logratio.synonyms import (
    aliases_of,
    as_fields,
    foreign_names,
    instead_of,
    nested,
    own_name,
    own_value,
)
from logratio.validation import fitted_field, split_list

Values = dict[str, Any]
"""Fields and their values; the fields of nested settings are in a dict of their own."""

OF_A_CALL = ("resume", "overwrite", "dry_run", "stagewise")
"""Flags that belong to one call of a command, and not to the description of a run."""
OF_THE_COMMAND = ("demonstrations", "kinds")
"""Fields that a command sets itself, from the loss."""
SWITCHES = ("lora",)
"""Blocks that are off by default. Outside the block, their keys begin with its name."""
FLAGS: Mapping[str, str] = {
    "compile": "compile_layers",
    "loss_option": "loss_options",
    "eos": "append_eos",
    "chat": "text_as",
    "lora_target": "lora_targets",
    "lora_rslora": "lora_use_rslora",
    "lora_dora": "lora_use_dora",
}
"""Flags with another name than their field."""
INPUTS = ("data", "eval_data")
"""Fields with names of files, in which a number is always read as text."""
TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge")


class ConfigFileError(ConfigError):
    """A settings file cannot be read, or has a wrong key or value; the message has the line."""


class YamlSettings:
    """A settings dataclass that can be read from a YAML file and written to one."""

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """Read settings from a file.

        Paths in the file are relative to the working directory, as on the command line.

        Args:
            path: The YAML file.
            **overrides: Settings that take precedence over the file's.

        Raises:
            ConfigFileError: A key is unknown or given twice, or a value does not fit.
            MissingInputError: There is no such file.
            ConfigError, SettingTypeError: The settings contradict each other, or one is missing.

        Example:
            >>> TrainConfig.from_yaml("policy/run.yaml", lr=2e-6).lr
            2e-06
        """
        values: Values = read_values(cls, path) | as_fields(cls, overrides)
        if missing := _missing(cls, values):
            raise ConfigFileError(f"{path}: {' and '.join(missing)} must be given")
        made: Self = _made(cls, values)
        return made

    def to_yaml(self) -> str:
        """Return the settings as YAML, one line per field, defaults included.

        Left out are flags of one call (`resume`, `overwrite`), and values that no file can hold,
        such as a table in memory.
        """
        plain, how = _plain(self), {"sort_keys": False, "width": 10_000}
        text: str = yaml.safe_dump(plain, allow_unicode=True, **how)
        # PyYAML writes these line breaks unescaped, and reads them as spaces.
        is_safe = not set(text) & set("\x85\u2028\u2029")
        return text if is_safe else yaml.safe_dump(plain, **how)


def _made(kind: Any, values: Values) -> Any:
    """Create settings and the settings nested in them."""
    inner = _blocks(kind)
    return kind(
        **{
            name: _made(inner[name], value) if _is_block(inner, name, value) else value
            for name, value in values.items()
        }
    )


@cache
def _blocks(kind: Any) -> Mapping[str, Any]:
    """Return the fields with nested settings, and their classes."""
    return {name: inner for name, inner in nested(kind) if not hasattr(inner, "to_flag")}


def _is_block(inner: Mapping[str, Any], name: str, value: Any) -> bool:
    return name in inner and isinstance(value, dict)


def _missing(kind: Any, values: Values) -> list[str]:
    """Return the names of required fields without a value."""
    inner, missing = _blocks(kind), list[str]()
    for field in filter(_is_required, fields(kind)):
        value: Any = values.get(field.name, {} if field.name in inner else None)
        if _is_block(inner, field.name, value):
            missing += _missing(inner[field.name], value)
        elif field.name not in values:
            missing.append(field.name)
    return missing


@dataclass(frozen=True)
class Place:
    """Where the value of a key belongs.

    Attributes:
        owner: The dataclass with the field.
        path: The names of the nested settings that lead to the field, and the field's.
        block: The class of the field, if it is a dataclass.
    """

    owner: Any
    path: tuple[str, ...]
    block: Any = None


@cache
def _places(kind: Any) -> Mapping[str, Place]:
    """Return the place of each key of a file; a class's own fields hide those nested in it."""
    inner = _blocks(kind)
    skipped = (*OF_A_CALL, *OF_THE_COMMAND)
    own = {
        field.name: Place(kind, (field.name,), inner.get(field.name))
        for field in fields(kind)
        if field.name not in skipped
    }
    below = {
        (f"{name}_{key}" if name in SWITCHES else key): Place(
            place.owner, (name, *place.path), place.block
        )
        for name, block in inner.items()
        for key, place in _places(block).items()
    }
    return below | own


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def read_values(kind: type, path: str | Path) -> Values:
    """Read and check the settings in a file, without creating them.

    Args:
        kind: The settings dataclass.
        path: The YAML file.

    Returns:
        The fields that the file gives, as plain values.

    Raises:
        ConfigFileError, MissingInputError: See `YamlSettings.from_yaml`.
    """
    return _Reading(Path(path)).values(kind)


def flat(kind: Any, values: Values) -> Values:
    """Return the values of all blocks by their keys outside a block; a switch is True or False."""
    found: Values = {}
    for key, place in _places(kind).items():
        inner = values
        for name in place.path[:-1]:
            inner = inner.get(name) or {}
        if place.path[-1] not in inner:
            continue
        value = inner[place.path[-1]]
        if place.path[-1] in SWITCHES:
            found[key] = value is not None
        elif not place.block:
            found[key] = value
    return found


class _Reading:
    """Reads one file.

    Attributes:
        path: The file.
        kind: The class of its settings.
        keys: The key that gave each field, by the path of the field.
        off: Paths of the blocks that are switched off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind: Any = None
        self.keys: dict[tuple[str, ...], yaml.Node] = {}
        self.off: set[tuple[str, ...]] = set()

    def error(self, node: yaml.Node, why: object) -> ConfigFileError:
        """Return an error with the line of a node."""
        return ConfigFileError(f"{self.path}:{node.start_mark.line + 1}: {why}")

    def values(self, kind: type) -> Values:
        """Return the values of the whole file."""
        self.kind = kind
        found: Values = {}
        self._read_block(kind, self.root(), (), found)
        self._check_switches()
        self._check_blocks(kind, found, ())
        return found

    def root(self) -> yaml.MappingNode:
        """Parse the file, and return its mapping of keys to values."""
        try:
            root = yaml.compose(self.path.read_text("utf-8"), Loader=yaml.SafeLoader)
        except FileNotFoundError:
            raise MissingInputError(f"{self.path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigFileError(f"{self.path}: cannot be read: {error}") from error
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise ConfigFileError(f"{self.path}{line}: not YAML: {error.problem}") from error
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigFileError(f"{self.path}: not YAML: {error}") from error
        if not isinstance(root, yaml.MappingNode):
            raise ConfigFileError(f"{self.path}: write one `key: value` per line")
        return root

    def _read_block(
        self, kind: Any, node: yaml.MappingNode, above: tuple[str, ...], found: Values
    ) -> None:
        """Read the keys of a mapping into `found`; `above` is the path of the mapping."""
        for key, value in node.value:
            place, given = self._place(kind, key, value)
            path = (*above, *place.path)
            self._refuse_twice(path, key, given)
            if place.block and isinstance(value, yaml.MappingNode):
                _inner(found, path)
                self._read_block(place.block, value, path, found)
            elif place.block:
                self._switch(path, given, value, found)
            else:
                _inner(found, path[:-1])[path[-1]] = self._value(place, given, value)

    def _place(self, kind: Any, key: yaml.Node, value: yaml.Node) -> tuple[Place, str]:
        """Return the place of a key, and the key."""
        if not isinstance(key, yaml.ScalarNode):
            raise self.error(key, "a key must be a word")
        given = key.value.replace("-", "_")
        places = _places(kind)
        for spelled in (given, own_name(kind, given)):
            if (name := FLAGS.get(spelled, spelled)) in places:
                return places[name], given
        why = _unknown(kind, key.value, given, value.value)
        if isinstance(value, yaml.MappingNode) and "did you" not in why:
            blocks = ", ".join(_blocks(kind)) or "none"
            why += f"; blocks here are {blocks}, and every other setting is a top-level key"
        raise self.error(key, why)

    def _refuse_twice(self, path: tuple[str, ...], key: yaml.Node, given: str) -> None:
        if (before := self.keys.setdefault(path, key)) is not key:
            line = before.start_mark.line + 1
            raise self.error(key, f"{given} is already given in line {line}")

    def _switch(self, path: tuple[str, ...], given: str, node: yaml.Node, found: Values) -> None:
        """Read `lora: true`, `lora: false` or `lora: null`."""
        value = _truth(_scalar(node)) if isinstance(node, yaml.ScalarNode) else node
        if path[-1] not in SWITCHES or not isinstance(value, bool | None):
            raise self.error(node, f"{given} is a block: write its settings below it, indented")
        outer = _inner(found, path[:-1])
        if value:
            _inner(outer, path[-1:])
        else:
            self.off.add(path)
            outer.setdefault(path[-1], None)

    def _check_switches(self) -> None:
        """Refuse `lora_rank` without `lora: true`, as the command line does."""
        for path, key in self.keys.items():
            for end, name in enumerate(path[:-1], 1):
                switch = path[:end]
                if name in SWITCHES and (switch not in self.keys or switch in self.off):
                    raise self.error(
                        key, f"{'_'.join(path[end - 1 :])} is given without {name}: true"
                    )

    def _check_blocks(self, kind: Any, found: Values, above: tuple[str, ...]) -> None:
        """Refuse values that only the class of a block refuses, such as an unknown format."""
        for name, block in _blocks(kind).items():
            values, path = found.get(name), (*above, name)
            if not isinstance(values, dict):
                continue
            self._check_blocks(block, values, path)
            if _missing(block, values):
                continue
            try:
                _made(block, values)
            except LogratioError as error:
                cause = self._cause(block, values, path, error)
                raise self.error(cause, with_fields(str(error))) from error

    def _cause(
        self, block: Any, values: Values, path: tuple[str, ...], error: LogratioError
    ) -> yaml.Node:
        """Return the key of the value that causes an error: the first that alone is refused."""
        keys = [(key, self.keys[(*path, key)]) for key in values if (*path, key) in self.keys]
        for key, node in keys:
            try:
                _made(block, {key: values[key]})
            except LogratioError as alone:
                if str(alone) == str(error):
                    return node
            except TypeError:  # the block has required fields
                pass
        return self.keys[path] if path in self.keys else keys[-1][1]

    def _value(self, place: Place, given: str, node: yaml.Node) -> Any:
        """Return the first reading of a value that fits the field."""
        errors: list[tuple[bool, str]] = []
        for reading in self._readings(given, node):
            value = own_value(given, reading)
            try:
                fitted_field(place.owner, place.path[-1], value)
                return value
            except LogratioError as error:
                errors.append((isinstance(reading, list), with_fields(str(error))))
        errors.sort(key=lambda one: one[0])  # of several readings, that as one value comes first
        raise self.error(node, errors[0][1] + self._above(place, node))

    def _above(self, place: Place, node: yaml.Node) -> str:
        """Return advice if a list is given in a block, and the file itself has a list of the name.

        In a sweep, `lr` of `base` is one number and `lr` of the file the values to combine.
        """
        own = _places(self.kind).get(place.path[-1])
        is_list = isinstance(node, yaml.SequenceNode) and own is not None
        if not is_list or place.owner is self.kind or own is None or own.owner is not self.kind:
            return ""
        return f"; the list {place.path[-1]} is a key of the file itself, outside of any block"

    def _readings(self, given: str, node: yaml.Node) -> Iterator[Any]:
        """Yield a value as YAML 1.2 reads it, then as truth values, as text, and as a list.

        ``q_proj, v_proj`` without brackets is first read as a list, if it is no file's name.
        """
        plain = self._plain(node, _text if given in INPUTS else _scalar)
        if given == "chat" and isinstance(_truth(plain), bool):
            plain = "chat" if _truth(plain) else "text"
        if isinstance(plain, str) and given not in INPUTS and "," in plain:
            yield [_scalar(yaml.ScalarNode(str(node.tag), one)) for one in split_list(plain)]
        yield plain
        yield self._plain(node, lambda one: _truth(_scalar(one)))
        yield self._plain(node, _text)
        if isinstance(node, yaml.ScalarNode):
            yield [plain]

    def _plain(self, node: yaml.Node, read: Callable[[yaml.ScalarNode], Any]) -> Any:
        """Return a scalar, a list of scalars, or a mapping of scalars to scalars."""
        self._check_tag(node)
        if isinstance(node, yaml.SequenceNode):
            return [read(self._as_scalar(item)) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            pairs = [(self._as_scalar(k).value, read(self._as_scalar(v))) for k, v in node.value]
            if len({key for key, _ in pairs}) < len(pairs):
                raise self.error(node, "a key is given twice")
            return dict(pairs)
        return read(self._as_scalar(node))

    def _as_scalar(self, node: yaml.Node) -> yaml.ScalarNode:
        self._check_tag(node)
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "lists and mappings cannot be nested here")
        return node

    def _check_tag(self, node: yaml.Node) -> None:
        tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if tag not in TAGS:
            raise self.error(node, f"the tag {tag} is not supported")


def _inner(values: Values, path: tuple[str, ...]) -> Values:
    """Return the dict at a path, and create it if it is missing."""
    for name in path:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    return values


_NULLS = ("", "~", "null", "Null", "NULL")
_TRUTHS = {"true": True, "false": False}
_MORE_TRUTHS = {"yes": True, "on": True, "no": False, "off": False}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")


def _scalar(node: yaml.ScalarNode) -> Any:
    """Read a scalar with the core schema of YAML 1.2, plus "_" between digits."""
    text: str = node.value
    if node.style is not None:  # quoted, or a block of text
        return text
    if text in _NULLS:
        return None
    if text.lower() in _TRUTHS:
        return _TRUTHS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _text(node: yaml.ScalarNode) -> Any:
    """Return a number as its text, for a folder that is called 7; any other value unchanged."""
    value = _scalar(node)
    return node.value if isinstance(value, int | float) else value


def _truth(value: Any) -> Any:
    """Return the truth value of a word of YAML 1.1; any other value unchanged."""
    return _MORE_TRUTHS.get(value.lower(), value) if isinstance(value, str) else value


def _unknown(kind: Any, key: str, given: str, value: Any) -> str:
    """Describe a key that no field has, and what to write instead."""
    if given in OF_A_CALL:
        return f"{key} belongs to one call, not to a file: give --{given.replace('_', '-')}"
    for name, block in _blocks(kind).items():
        if name in SWITCHES and own_name(block, given) in _places(block):
            return f"unknown key {key}: write it below `{name}:`, indented"
    if advice := instead_of(given, value, in_file=True):
        return f"unknown key {key}: {advice}"
    known = {
        name: name for name in (*FLAGS, *_places(kind)) if FLAGS.get(name, name) in _places(kind)
    }
    names = (*foreign_names(), *aliases_of(kind))
    known |= {name: own for name in names if (own := own_name(kind, name)) in known}
    near = get_close_matches(given, known, 1, cutoff=0.7)
    return f"unknown key {key}" + (f": did you mean {known[near[0]]}?" if near else "")


def _plain(settings: Any) -> Values:
    """Return settings as values that YAML can hold; values that it cannot are left out."""
    skipped = (*OF_A_CALL, *OF_THE_COMMAND)
    named = [(f.name, getattr(settings, f.name)) for f in fields(settings) if f.name not in skipped]
    written = ((name, _written(value)) for name, value in named)
    return {name: value for name, value in written if value is not UNWRITABLE}


def unwritable(settings: Any) -> list[str]:
    """Return the fields that `to_yaml` leaves out because no text holds them, such as tables."""
    return [f.name for f in fields(settings) if _written(getattr(settings, f.name)) is UNWRITABLE]


UNWRITABLE = object()


def _written(value: Any) -> Any:
    """Return a value as YAML's types, or `UNWRITABLE`."""
    if isinstance(value, list | tuple):
        items = [_written(item) for item in value]
        return UNWRITABLE if UNWRITABLE in items else items
    if isinstance(value, Mapping):  # a DatasetDict is one too
        named = {str(key): _written(item) for key, item in value.items()}
        return UNWRITABLE if UNWRITABLE in named.values() else named
    if hasattr(value, "to_flag"):
        return value.to_flag() or UNWRITABLE
    if is_dataclass(value):
        return _plain(value)
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else UNWRITABLE
