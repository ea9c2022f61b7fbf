"""Sealed stores that were made before: is it one, does it fit, where do its groups come from."""

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


class StoreMismatchError(LogratioError, ValueError):
    """A store was made with another tokenizer or other rules, or is named beside other inputs."""


def is_store(inputs: Inputs) -> bool:
    """Say whether the inputs are one sealed store, told by how it begins.

    Raises:
        ValueError: A store stands among other inputs.
    """
    inputs = as_inputs(inputs)
    found = [given for given in inputs if isinstance(given, str | Path) and _begins_as_store(given)]
    if found and len(inputs) > 1:
        raise StoreMismatchError(
            f"{found[0]} is a sealed store, which is read alone: build one store of all the inputs"
        )
    return bool(found)


def _begins_as_store(path: Path | str) -> bool:
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(len(STORE_MAGIC)) == STORE_MAGIC


def source_names(store: Store, groups: Sequence[int]) -> list[str]:
    """Name the file and line of each group."""
    files, lines = store.sources()
    names = json.loads(store.metadata).get("files", [])
    return [f"{names[files[g]] if files[g] < len(names) else '?'}:{lines[g]}" for g in groups]


def datasets_of(store: Store) -> tuple[int, ...]:
    """Tell for each file of a store which input of `build_store` it belonged to."""
    return tuple(json.loads(store.metadata)["datasets"])


def load_store(path: Path | str, tokenizer: PreferenceTokenizer) -> tuple[Store, DataReport]:
    """Open a store that `build_store` made, if it was made with this tokenizer and its rules.

    Rules that a store does not name, which an older version made, had their defaults. The date
    that a template writes is the store's where the tokenizer was given none.

    Returns:
        The store, and what became of every row when it was made.

    Raises:
        CorruptStoreError: The file is not a store, or damaged.
        StoreMismatchError: Its ids are not those that this tokenizer makes.
        OSError: The file cannot be read.
    """
    store = Store.open(path)
    metadata = json.loads(store.metadata)
    if metadata.get("tokenizer") != tokenizer.digest:
        raise StoreMismatchError(
            f"{path} was made with tokenizer {metadata.get('tokenizer')}, and here it is "
            f"{tokenizer.digest}: build it again, or give the same"
        )
    made, here = rules_of(store), tokenizer.rules
    if not tokenizer.has_given_date:
        here = replace(here, date=made.date)
    if {made.text_as, here.text_as} == {None, "text"}:  # the same ids
        here = replace(here, text_as=made.text_as)
    _check_rules(path, made, here)
    return store, DataReport.from_dict(metadata["report"])


def rules_of(store: Store) -> TokenizationRules:
    """Return the rules under which a store was made."""
    return TokenizationRules.from_dict(json.loads(store.metadata)["rules"])


def _check_rules(path: Path | str, made: TokenizationRules, here: TokenizationRules) -> None:
    others = here.to_dict()
    differing = {name: value for name, value in made.to_dict().items() if value != others[name]}
    if differing:
        then = ", ".join(f"{name} {value}" for name, value in differing.items())
        now = ", ".join(f"{name} {others[name]}" for name in differing)
        raise StoreMismatchError(
            f"{path} was made with the rules {then}, and here they are {now}: build it again, or "
            "give the same"
        )


def verified(path: Path | str) -> Store:
    """Open a store and compare every byte of it with its checksums.

    Raises:
        CorruptStoreError: The file is not a store, or damaged; names the place.
        OSError: The file cannot be read.
    """
    if Path(path).is_dir():
        raise IsFolderError(errno.EISDIR, "Is a folder; name a store in it", str(path))
    store = Store.open(path)
    store.verify()
    return store
