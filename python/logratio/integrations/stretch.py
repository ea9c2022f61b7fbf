"""A stretch of a store as columns of a table."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, SharedLayout, Store
from logratio.data.containers.arrow_library import arrow
from logratio.integrations.lookup import CachedLogps

if TYPE_CHECKING:
    import pyarrow

Columns = Mapping[str, Callable[[], "pyarrow.Array"]]
"""What makes each column, for only some of them are wanted."""


def source_files(store: Store) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """Return the name of each group's file, an array of objects, and its line in it."""
    files, lines = store.sources()
    names = json.loads(store.metadata).get("files", [])
    return np.array([*names, None], object)[np.minimum(files, len(names))], lines


class Stretch:
    """Some groups of a store and their reference's log-probs: `G` groups, `N` completions."""

    def __init__(
        self,
        layout: SharedLayout,
        logps: CachedLogps,
        files: tuple[NDArray[Any], NDArray[np.uint64]],
    ) -> None:
        self._layout, self._logps = layout, logps
        self._files, self._lines = (column[layout.groups] for column in files)
        self._pa = arrow("A table of reference log-probs")

    @cached_property
    def _sums(self) -> NDArray[np.float64]:
        return self._logps.sums(self._layout)

    def pairs(self) -> Columns:
        """Make columns of `G` rows, of groups that are pairs."""
        chosen = self._side("chosen", "ref_chosen", slice(0, None, 2))
        rejected = self._side("rejected", "ref_rejected", slice(1, None, 2))
        return {**self._groups(np.arange(len(self._layout.groups))), **chosen, **rejected}

    def completions(self) -> Columns:
        """Make columns of `N` rows."""
        layout = self._layout
        owners = np.repeat(np.arange(len(layout.groups)), layout.group_sizes)
        return {
            **self._groups(owners),
            **self._side("completion", "ref", slice(None)),
            "group": lambda: self._pa.array(layout.groups[owners]),
            "role": lambda: self._pa.array(np.array(ROLES, object)[layout.roles]),
        }

    def _groups(self, owners: NDArray[np.int64]) -> Columns:
        """Make the columns that say something of a row's group."""
        return {
            "prompt_ids": lambda: self._prompts().take(self._pa.array(owners)),
            "file": lambda: self._pa.array(self._files[owners], self._pa.string()),
            "line": lambda: self._pa.array(self._lines[owners]),
        }

    def _prompts(self) -> "pyarrow.Array":
        """Cut the prompts out of a row of prompt, completions, prompt, completions."""
        layout = self._layout
        first = np.cumsum(layout.group_sizes) - layout.group_sizes
        behind = np.add.reduceat(layout.completion_lengths, first)
        lengths = np.column_stack((layout.prompt_lengths, behind)).ravel()
        is_prompt = np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)
        ends = np.cumsum(layout.prompt_lengths)
        return self._lists(layout.input_ids[is_prompt], np.concatenate(([0], ends)), np.int32)

    def _side(self, side: str, reference: str, rows: slice) -> Columns:
        """Make the columns that say something of a completion, for some of them."""
        layout = self._layout

        def lists(values: NDArray[Any], dtype: Any) -> "pyarrow.Array":
            every = self._lists(values, layout.completion_offsets, dtype)
            return every.take(self._pa.array(np.arange(len(every))[rows]))

        return {
            f"{side}_ids": lambda: lists(layout.target_ids, np.int32),
            f"{side}_mask": lambda: lists(layout.completion_mask, np.uint8),
            f"{reference}_logps": lambda: self._pa.array(self._sums[rows]),
            f"{reference}_per_token_logps": lambda: lists(
                self._logps.per_token(layout), np.float32
            ),
        }

    def _lists(self, values: NDArray[Any], offsets: NDArray[Any], dtype: Any) -> "pyarrow.Array":
        values = values.astype(dtype, copy=False)
        return self._pa.ListArray.from_arrays(offsets.astype(np.int32), values)
