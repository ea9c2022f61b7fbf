"""Where the groups of a store came from."""

import json
from typing import Any

from logratio._rust import Store
from logratio.data.records import Source


class Places:
    """File and line of each group, by its number; files are named where the store names them."""

    def __init__(self, store: Store) -> None:
        self._files, self._lines = store.sources()
        self._names: list[Any] = json.loads(store.metadata).get("files", [])

    def __getitem__(self, group: int) -> str:
        number = int(self._files[group])
        name = self._names[number] if number < len(self._names) else f"file {number}"
        return str(Source(str(name), int(self._lines[group])))
