"""A store's groups with the reference's log-probs next to them, as a table for any trainer."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, CacheReader, SharedLayout, Store
from logratio.cache.cache import NoReferenceError, ReferenceCache
from logratio.cache.logps import open_reader
from logratio.data.readers.arrow_library import arrow
from logratio.data.readers.inputs import Inputs, as_inputs
from logratio.data.store.build import build_store
from logratio.data.store.load import is_store
from logratio.data.tokenization.groups import PAIR
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.durable import published
from logratio.errors import LogratioError
from logratio.extras import require

if TYPE_CHECKING:
    import pyarrow

STRETCH_TOKENS = 2**20
"""Tokens looked up together: some 20 MB of ids and log-probs."""

FIELDS = (
    *("input_ids", "target_ids", "completion_mask", "completion_offsets", "prompt_lengths"),
    *("completion_lengths", "group_sizes", "roles", "groups", "completions"),
)


class MissingLogpsError(LogratioError, ValueError):
    """There is no such reference in the cache, or it lacks log-probs of the data."""


def open_reference(
    cache: str | Path, name: str | None = None, *, sums: bool = False
) -> CacheReader:
    """Open the log-probs of one reference below a cache's root, without looking at its model.

    Args:
        cache: The root that `logratio precompute` filled.
        name: Name of the reference's folder there, or how it begins; may be left out where there
            is one reference only.
        sums: The cache holds sums only.

    Raises:
        MissingLogpsError: No reference is named so, or several are.
        DamagedFingerprintError, CorruptCacheError: The cache was altered.
    """
    try:
        stored = ReferenceCache(cache).reference(name, sums=sums)
    except NoReferenceError as error:
        raise MissingLogpsError(str(error)) from error
    stored.check()
    return open_reader(stored)


class CachedLogps:
    """The reference's log-probs of a store's completions; keys are joined to rows once, here.

    Attributes:
        store: `N` completions.
        missing: Completions that the cache lacks.
    """

    def __init__(self, store: Store, reader: CacheReader, *, sums: bool = False) -> None:
        self.store, self._reader, self._sums = store, reader, sums
        self._rows = reader.join(store.sum_keys() if sums else store.keys())
        self.missing = int((self._rows < 0).sum())

    def check(self, source: object, advice: str) -> None:
        """Refuse to go on where something is missing.

        Raises:
            MissingLogpsError: With the number of completions and `advice`.
        """
        if self.missing:
            raise MissingLogpsError(
                f"{source}: {self.missing:,} of {len(self._rows):,} completions are not in the "
                f"cache; {advice}"
            )

    def stretches(self) -> Iterator[SharedLayout]:
        """Yield all groups in their order, laid out end to end, some at a time."""
        ends = np.cumsum(self.store.shared_lengths(), dtype=np.int64)
        first = 0
        while first < len(ends):
            done = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, done + STRETCH_TOKENS, "right")))
            yield self.store.shared_layout(np.arange(first, stop), fields=FIELDS)
            first = stop

    def per_token(self, layout: SharedLayout) -> NDArray[np.float32]:
        """Return the log-prob of every completion token of a stretch, float32 `[S]`, in nats.

        Raises:
            MissingLogpsError: The cache holds sums only.
        """
        if self._sums:
            raise MissingLogpsError("the cache holds sums only, no log-prob of a token")
        _, logps = self._reader.read(self._rows[layout.completions])
        return logps

    def sums(
        self, layout: SharedLayout, weights: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Add up the log-probs of each completion of a stretch.

        Args:
            layout: `N` completions of `S` tokens.
            weights: float64 `[S]`; None: 1 for every token that counts.

        Returns:
            float64 `[N]`, in nats.

        Raises:
            MissingLogpsError: Weights are given and the cache holds sums only.
        """
        if self._sums and weights is None:
            return self._reader.read_sums(self._rows[layout.completions])[1]
        counted = layout.completion_mask if weights is None else weights
        weighted = self.per_token(layout) * counted.astype(np.float64)
        return np.add.reduceat(weighted, layout.completion_offsets[:-1])


def counted_places(layout: SharedLayout) -> NDArray[np.int64]:
    """Number the tokens that count within their completion, from 1 on: int64 `[S]`."""
    counted = np.cumsum(layout.completion_mask, dtype=np.int64)
    first = layout.completion_offsets[:-1]
    before = counted[first] - layout.completion_mask[first]
    places: NDArray[np.int64] = counted - np.repeat(before, np.diff(layout.completion_offsets))
    return places


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


Shape = Literal["pairs", "completions"]


class ColumnsError(LogratioError, ValueError):
    """The data cannot be written as the table that is asked for."""


def reference_table(
    data: Store | Inputs,
    cache: str | Path,
    *,
    reference: str | None = None,
    tokenizer: PreferenceTokenizer | None = None,
    sums: bool = False,
    shape: Shape = "pairs",
    per_token: bool = False,
) -> "ReferenceTable":
    """Put the reference's log-probs beside the groups that they belong to.

    A row of ``pairs`` has `prompt_ids`, `chosen_ids` and `rejected_ids`, and beside each side its
    reference's sum: `ref_chosen_logps` and `ref_rejected_logps`, float64, in nats. A row of
    ``completions``, of any kind of group, has `group` and `role`, `prompt_ids`, `completion_ids`
    and `ref_logps`. Ids are lists of int32. Where a token does not count, sums are without it and
    `chosen_mask`, … (lists of uint8) say which do. `per_token` adds `ref_chosen_per_token_logps`,
    …, lists of float32, of every token. `file` and `line` say where a group comes from.

    Args:
        data: A store, or the path of a sealed one; or files, folders and tables to read, which
            need `tokenizer`.
        cache: Root of the reference cache.
        reference: Name of the reference's folder in it, or how it begins; may be left out where
            there is one only.
        tokenizer: What turns text into ids: the reference's, with the rules of its pass.
        sums: The cache holds sums only.
        shape: What a row is.
        per_token: Write the log-prob of every token too.

    Raises:
        ColumnsError: Groups are no pairs; or the arguments contradict each other.
        MissingLogpsError: The cache lacks the reference, or completions.
        BadDataError, CorruptStoreError, CorruptCacheError: The data or the cache is damaged.
    """
    if shape not in get_args(Shape):
        raise ColumnsError(f"shape is {shape!r}, not one of {', '.join(get_args(Shape))}")
    if sums and per_token:
        raise ColumnsError("a cache with sums only has no log-prob of a token: leave per_token out")
    store = _store_of(data, tokenizer)
    if shape == "pairs":
        _check_pairs(store)
    logps = CachedLogps(store, open_reference(cache, reference, sums=sums), sums=sums)
    logps.check(cache, "run `logratio precompute` on the same data and limits to add them")
    return ReferenceTable(logps, shape, per_token)


def _store_of(data: Store | Inputs, tokenizer: PreferenceTokenizer | None) -> Store:
    if isinstance(data, Store):
        return data
    inputs = as_inputs(data)
    if is_store(inputs):
        return Store.open(inputs[0])
    if tokenizer is None:
        raise ColumnsError("data that is no sealed store needs a tokenizer")
    return build_store(inputs, tokenizer)[0]


def _check_pairs(store: Store) -> None:
    sizes = np.diff(store.completion_offsets())
    if (sizes == 2).all() and (store.roles().reshape(-1, 2) == PAIR).all():
        return
    raise ColumnsError(
        "some groups are no pair of chosen and rejected: ask for the shape 'completions'"
    )


@dataclass(frozen=True)
class ReferenceTable:
    """Groups and their reference's log-probs, read again for every use; see `reference_table`.

    Anything that takes `__arrow_c_stream__` reads it (polars, duckdb, pyarrow). About a million
    tokens are in memory at a time.

    Attributes:
        logps: The store, and what the cache knows of it.
        shape: What a row is.
        per_token: There are columns with the log-prob of every token.
    """

    logps: CachedLogps
    shape: Shape = "pairs"
    per_token: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        """What the columns of completions are named after."""
        return ("chosen", "rejected") if self.shape == "pairs" else ("completion",)

    @property
    def masked(self) -> bool:
        """Whether there is a token that does not count, so that there are columns of masks."""
        store = self.logps.store
        return bool((store.counted_lengths() != store.completion_lengths()).any())

    @property
    def schema(self) -> "pyarrow.Schema":
        """Names and types of the columns."""
        pa = arrow("A table of reference log-probs")
        ids, masks, logps = (pa.list_(kind) for kind in (pa.int32(), pa.uint8(), pa.float32()))
        fields = [("prompt_ids", ids)]
        if self.shape == "completions":
            fields += [("group", pa.int64()), ("role", pa.string())]
        for side in self.sides:
            name = reference_name(side)
            fields += [(f"{side}_ids", ids), (f"{name}_logps", pa.float64())]
            if self.masked:
                fields.append((f"{side}_mask", masks))
            if self.per_token:
                fields.append((f"{name}_per_token_logps", logps))
        return pa.schema([*fields, ("file", pa.string()), ("line", pa.uint64())])

    def batches(self) -> Iterator["pyarrow.RecordBatch"]:
        """Yield the rows in the store's order.

        Raises:
            CorruptStoreError, CorruptCacheError: A byte of what is read was altered.
        """
        pa = arrow("A table of reference log-probs")
        schema, files = self.schema, source_files(self.logps.store)
        for layout in self.logps.stretches():
            stretch = Stretch(layout, self.logps, files)
            columns = stretch.pairs() if self.shape == "pairs" else stretch.completions()
            yield pa.record_batch([columns[name]() for name in schema.names], schema=schema)

    def to_parquet(self, path: str | Path) -> None:
        """Write a Parquet file, which has its name once it is whole.

        Raises:
            OSError: It cannot be written.
        """
        pq, schema = arrow("Parquet").parquet, self.schema
        with published(Path(path)) as partial, pq.ParquetWriter(str(partial), schema) as writer:
            for batch in self.batches():
                writer.write_batch(batch)

    def to_dataset(self, path: str | Path | None = None) -> Any:
        """Return a `datasets.Dataset`.

        Args:
            path: An Arrow file to write, which the dataset maps; None: every row is in memory.

        Raises:
            MissingExtraError: `datasets` is not installed.
            OSError: The file cannot be written.
        """
        datasets, pa, schema = require("datasets", "trl"), arrow("A dataset"), self.schema
        if path is None:
            return datasets.Dataset(pa.Table.from_batches(self.batches(), schema))
        with published(Path(path)) as partial, pa.ipc.new_stream(str(partial), schema) as writer:
            for batch in self.batches():
                writer.write_batch(batch)
        return datasets.Dataset.from_file(str(path))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Hand the rows to another library, stretch by stretch."""
        reader = arrow("A table").RecordBatchReader.from_batches(self.schema, self.batches())
        return reader.__arrow_c_stream__(requested_schema)


def reference_name(side: str) -> str:
    """Say what the columns of a side's reference begin with, as other trainers spell it."""
    return "ref" if side == "completion" else f"ref_{side}"
