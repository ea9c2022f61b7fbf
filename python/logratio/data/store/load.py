"""Open existing stores: detect them, compare tokenizer and rules, find the sources of groups."""

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from logratio._rust import CorruptStoreError as CorruptStoreError
from logratio._rust import Store
from logratio.data.readers.inputs import STORE_MAGIC, Inputs, as_inputs
from logratio.data.store.row_report import DataReport
from logratio.data.tokenization.groups import TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import IsFolderError, LogratioError
from logratio.validation import PATH, check_argument


class StoreMismatchError(LogratioError, ValueError):
    """A store was built with another tokenizer or rules, or is combined with other inputs."""


def is_store(inputs: Inputs) -> bool:
    """Return whether the inputs are one sealed store, from its first bytes.

    Raises:
        ValueError: There are other inputs besides the store.
    """
    inputs = as_inputs(inputs)
    found = [given for given in inputs if isinstance(given, str | Path) and _begins_as_store(given)]
    if found and len(inputs) > 1:
        raise StoreMismatchError(
            f"{found[0]} is a sealed store, which must be the only input: build one of all inputs"
        )
    return bool(found)


def _begins_as_store(path: Path | str) -> bool:
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(len(STORE_MAGIC)) == STORE_MAGIC


def source_names(store: Store, groups: Sequence[int]) -> list[str]:
    """Return the file and line of each group, as ``file:line``."""
    files, lines = store.sources()
    names = json.loads(store.metadata).get("files", [])
    return [f"{names[files[g]] if files[g] < len(names) else '?'}:{lines[g]}" for g in groups]


def datasets_of(store: Store) -> tuple[int, ...]:
    """Return for each file of a store the index of its input to `build_store`."""
    return tuple(json.loads(store.metadata)["datasets"])


def load_store(path: Path | str, tokenizer: PreferenceTokenizer) -> tuple[Store, DataReport]:
    """Open a store of `build_store`, after checking that this tokenizer and its rules built it.

    Rules that an older store does not record count as defaults. If the tokenizer was given no date,
    the store's date is used.

    Args:
        path: The store.
        tokenizer: The tokenizer, with the rules that the caller expects.

    Returns:
        The store, and the report of the run that built it.

    Raises:
        CorruptStoreError: The file is not a store, or is damaged.
        StoreMismatchError: The store was built with another tokenizer or other rules.
        OSError: The file cannot be read.
        SettingTypeError: `path` is not a path, or `tokenizer` no tokenizer.
    """
    check_argument("path", PATH, path)
    check_argument("tokenizer", PreferenceTokenizer, tokenizer)
    store = Store.open(path)
    metadata = json.loads(store.metadata)
    if metadata.get("tokenizer") != tokenizer.digest:
        raise StoreMismatchError(
            f"{path} was built with tokenizer {metadata.get('tokenizer')}, but this one is "
            f"{tokenizer.digest}: build it again, or use the same tokenizer"
        )
    made, here = rules_of(store), tokenizer.rules
    if not tokenizer.has_given_date:
        here = replace(here, date=made.date)
    if {made.text_as, here.text_as} == {None, "text"}:  # both give the same ids
        here = replace(here, text_as=made.text_as)
    _check_rules(path, made, here)
    return store, DataReport.from_dict(metadata["report"])


def rules_of(store: Store) -> TokenizationRules:
    """Return the rules with which a store was built."""
    return TokenizationRules.from_dict(json.loads(store.metadata)["rules"])


def _check_rules(path: Path | str, made: TokenizationRules, here: TokenizationRules) -> None:
    others = here.to_dict()
    differing = {name: value for name, value in made.to_dict().items() if value != others[name]}
    if differing:
        then = ", ".join(f"{name} {value}" for name, value in differing.items())
        now = ", ".join(f"{name} {others[name]}" for name in differing)
        raise StoreMismatchError(
            f"{path} was built with the rules {then}, but now they are {now}: build it again, or "
            "use the same rules"
        )


def verified(path: Path | str) -> Store:
    """Open a store and verify the checksums of every byte.

    Raises:
        CorruptStoreError: The file is not a store, or is damaged; the message names the place.
        OSError: The file cannot be read.
    """
    if Path(path).is_dir():
        raise IsFolderError(errno.EISDIR, "Is a folder; name a store in it", str(path))
    store = Store.open(path)
    store.verify()
    return store
