"""The base class of logratio's exceptions, and exceptions used by several modules."""

import re
from pathlib import Path
from typing import Literal

from logratio.setting_names import worded

_HUB_ID = re.compile(
    r"(?:(?:https?:/+)?(?:huggingface\.co|hf\.co)/+|hf:/+)?(?:datasets/)?"
    r"(\w[\w.-]*(?:/\w[\w.-]*)?)"
)
_DATA_SUFFIXES = (
    *(".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".store", ".txt"),
)


class LogratioError(Exception):
    """Base class of all logratio exceptions.

    Each exception also derives from the matching built-in class (`ValueError`, `OSError` …). Its
    text names settings as fields, and in the command line as flags.
    """

    def __str__(self) -> str:
        return worded(super().__str__())


class ConfigError(LogratioError, ValueError):
    """The settings contradict each other or name something that does not exist."""


class SettingTypeError(LogratioError, TypeError):
    """A setting or an argument has the wrong type."""


class UnknownSettingError(ConfigError, SettingTypeError):
    """Settings have no field of this name; the message names the alternative."""


class ArgumentError(LogratioError, ValueError):
    """An argument of the compiled module is invalid."""


class CorruptStoreError(LogratioError, ValueError):
    """The file is not a store, or part of it is missing or altered."""


class CorruptCacheError(LogratioError, ValueError):
    """A file of a cache is damaged, has impossible values, or is of another reference."""


class InputError(LogratioError, OSError):
    """A file or folder cannot be used."""


class MissingInputError(LogratioError, FileNotFoundError):
    """A file or folder to read does not exist."""


class IsFolderError(LogratioError, IsADirectoryError):
    """A folder is given where a file is expected."""


def hub_id(given: object) -> str | None:
    """Return the id of the Hugging Face hub that `given` looks like, or None.

    A name in an existing folder is a path, as is one in `data/`.
    """
    found = _HUB_ID.fullmatch(str(given))
    if not found or Path(found[1]).parts[0] in ("data", ".."):
        return None
    name = found[1]
    is_path = "/" in name and Path(name).parent.exists() and name == str(given)
    return None if is_path else name


def fetching_advice(
    given: object, kind: Literal["model", "dataset"], place: Path | None = None
) -> str:
    """Return advice to download `given` if it looks like an id of the Hugging Face hub, else "".

    Args:
        given: The name of a folder or file that does not exist.
        kind: What was expected there.
        place: The folder to download to. None: a folder with the last part of the id.
    """
    name = hub_id(given)
    if name is None:
        return ""
    if kind == "dataset" and ("/" not in name or name.endswith(_DATA_SUFFIXES)):
        return ""
    target = place or Path(name).name
    option = "--repo-type dataset " if kind == "dataset" else ""
    return (
        f". If it is a {kind} on the Hugging Face hub, download it first: `hf download {name} "
        f"{option}--local-dir {target}`" + ("" if place else f", and pass {target}")
    )
