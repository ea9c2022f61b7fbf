"""Tables of a store's groups with their reference log-probs, for any trainer."""

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
from logratio.data.store.turn_weights import with_weights
from logratio.data.tokenization.groups import PAIR
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.durable import published
from logratio.errors import LogratioError
from logratio.extras import require
from logratio.forecast import count

if TYPE_CHECKING:
    import pyarrow

CHUNK_TOKENS = 2**20
"""Tokens per chunk: about 20 MB of ids and log-probs."""

FIELDS = (
    *("input_ids", "target_ids", "completion_mask", "completion_offsets", "prompt_lengths"),
    *("completion_lengths", "group_sizes", "roles", "groups", "completions"),
)


class MissingLogpsError(LogratioError, ValueError):
    """The cache lacks the reference, or log-probs of the data."""


def open_reference(
    cache: str | Path, name: str | None = None, *, sums: bool = False
) -> CacheReader:
    """Open the log-probs of one reference in a cache, without access to its model.

    Args:
        cache: Root of the cache that `logratio precompute` filled.
        name: Name or prefix of the reference's folder; may be omitted if there is only one.
        sums: Open a folder that contains only sums.

    Raises:
        MissingLogpsError: None or several references match.
        DamagedFingerprintError, CorruptCacheError: The cache was altered.
    """
    try:
        stored = ReferenceCache(cache).reference(name, sums=sums)
    except NoReferenceError as error:
        raise MissingLogpsError(str(error)) from error
    stored.check()
    return open_reader(stored)


class CachedLogps:
    """The reference log-probs of a store's completions. Keys are looked up once, at creation.

    Attributes:
        store: The store, with `N` completions.
        missing: Number of completions that the cache lacks.
    """

    def __init__(self, store: Store, reader: CacheReader, *, sums: bool = False) -> None:
        self.store, self._reader, self._sums = store, reader, sums
        self._rows = reader.join(store.sum_keys() if sums else store.keys())
        self.missing = int((self._rows < 0).sum())

    def __repr__(self) -> str:
        return f"CachedLogps({self.store!r}, {self.missing:,} missing)"

    def check(self, source: object, advice: str) -> None:
        """Check that no completion is missing.

        Args:
            source: Name of the cache for the message.
            advice: What the user can do, for the message.

        Raises:
            MissingLogpsError: Some are; the message has their number and `advice`.
        """
        if self.missing:
            raise MissingLogpsError(
                f"{source}: {self.missing:,} of {len(self._rows):,} completions are not in the "
                f"cache; {advice}"
            )

    def chunks(self) -> Iterator[SharedLayout]:
        """Yield the layouts of all groups in order, in chunks of about `CHUNK_TOKENS`."""
        ends = np.cumsum(self.store.shared_lengths(), dtype=np.int64)
        first = 0
        while first < len(ends):
            done = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, done + CHUNK_TOKENS, "right")))
            yield self.store.shared_layout(np.arange(first, stop), fields=FIELDS)
            first = stop

    def per_token(self, layout: SharedLayout) -> NDArray[np.float32]:
        """Return the log-prob of every completion token of a chunk, float32 `[S]`, in nats.

        Raises:
            MissingLogpsError: The cache contains only sums.
        """
        if self._sums:
            raise MissingLogpsError("the cache contains only sums, not per-token log-probs")
        _, logps = self._reader.read(self._rows[layout.completions])
        return logps

    def sums(
        self, layout: SharedLayout, weights: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Sum the log-probs of each completion of a chunk.

        Args:
            layout: The chunk, with `N` completions of `S` tokens in total.
            weights: Weight of each token, float64 `[S]`; None: 1 for every loss token.

        Returns:
            The sums in nats, float64 `[N]`.

        Raises:
            MissingLogpsError: Weights are given, but the cache contains only sums.
        """
        if self._sums and weights is None:
            return self._reader.read_sums(self._rows[layout.completions])[1]
        counted = layout.completion_mask if weights is None else weights
        weighted = self.per_token(layout) * counted.astype(np.float64)
        return np.add.reduceat(weighted, layout.completion_offsets[:-1])


def loss_token_numbers(layout: SharedLayout) -> NDArray[np.int64]:
    """Number the loss tokens of each completion from 1, int64 `[S]`."""
    counted = np.cumsum(layout.completion_mask, dtype=np.int64)
    first = layout.completion_offsets[:-1]
    before = counted[first] - layout.completion_mask[first]
    numbers: NDArray[np.int64] = counted - np.repeat(before, np.diff(layout.completion_offsets))
    return numbers


Columns = Mapping[str, Callable[[], "pyarrow.Array"]]
"""Functions that compute the columns; only the columns of the schema are computed."""


def source_files(store: Store) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """Return the file name (object array) and line number of each group."""
    files, lines = store.sources()
    names = json.loads(store.metadata).get("files", [])
    return np.array([*names, None], object)[np.minimum(files, len(names))], lines


class TableChunk:
    """A chunk of `G` groups with `N` completions, and their reference log-probs."""

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
        """Return columns of `G` rows, for groups that are pairs."""
        chosen = self._side("chosen", "ref_chosen", slice(0, None, 2))
        rejected = self._side("rejected", "ref_rejected", slice(1, None, 2))
        return {**self._groups(np.arange(len(self._layout.groups))), **chosen, **rejected}

    def completions(self) -> Columns:
        """Return columns of `N` rows, one per completion."""
        layout = self._layout
        owners = np.repeat(np.arange(len(layout.groups)), layout.group_sizes)
        return {
            **self._groups(owners),
            **self._side("completion", "ref", slice(None)),
            "group": lambda: self._pa.array(layout.groups[owners]),
            "role": lambda: self._pa.array(np.array(ROLES, object)[layout.roles]),
        }

    def _groups(self, owners: NDArray[np.int64]) -> Columns:
        """Return the columns that describe a row's group."""
        return {
            "prompt_ids": lambda: self._prompts().take(self._pa.array(owners)),
            "file": lambda: self._pa.array(self._files[owners], self._pa.string()),
            "line": lambda: self._pa.array(self._lines[owners]),
        }

    def _prompts(self) -> "pyarrow.Array":
        """Extract the prompts from the concatenated prompts and completions."""
        layout = self._layout
        first = np.cumsum(layout.group_sizes) - layout.group_sizes
        after = np.add.reduceat(layout.completion_lengths, first)
        lengths = np.column_stack((layout.prompt_lengths, after)).ravel()
        is_prompt = np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)
        ends = np.cumsum(layout.prompt_lengths)
        return self._lists(layout.input_ids[is_prompt], np.concatenate(([0], ends)), np.int32)

    def _side(self, side: str, reference: str, rows: slice) -> Columns:
        """Return the columns that describe the completions in `rows`."""
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
    """The data cannot be written as the requested table."""


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
    """Create a table of groups with their reference log-probs.

    With the shape ``pairs``, a row has `prompt_ids`, `chosen_ids` and `rejected_ids`, and the sums
    `ref_chosen_logps` and `ref_rejected_logps` (float64, in nats). With ``completions``, which
    supports every kind of group, a row has `group`, `role`, `prompt_ids`, `completion_ids` and
    `ref_logps`. Ids are lists of int32. If some tokens are excluded from the loss, the sums exclude
    them too, and `chosen_mask`, … (lists of uint8) contain the loss mask. `per_token` adds
    `ref_chosen_per_token_logps`, … (lists of float32, every token). `file` and `line` give the
    source of a group.

    Args:
        data: A store or its path; or files, folders and tables, which need `tokenizer`.
        cache: Root of the reference cache.
        reference: Name or prefix of the reference's folder; may be omitted if there is only one.
        tokenizer: The reference's tokenizer, with the rules that `precompute` used.
        sums: The cache contains only sums.
        shape: ``pairs``, a row per pair; or ``completions``, a row per completion.
        per_token: Also write the log-prob of every token.

    Returns:
        The table, which reads its data when it is used.

    Raises:
        ColumnsError: Groups are not pairs, turns have weights other than 0 and 1, or the arguments
            contradict each other.
        MissingLogpsError: The cache lacks the reference, or completions.
        BadDataError, CorruptStoreError, CorruptCacheError: The data or the cache is damaged.

    Example:
        >>> table = reference_table("pairs.store", "cache")
        >>> table.to_parquet("pairs.parquet")
    """
    if shape not in get_args(Shape):
        raise ColumnsError(f"shape is {shape!r}, not one of {', '.join(get_args(Shape))}")
    if sums and per_token:
        raise ColumnsError("a cache with only sums has no per-token log-probs: leave per_token out")
    store = _store_of(data, tokenizer)
    if shape == "pairs":
        _check_pairs(store)
    _check_turns(store)
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
        raise ColumnsError("data that is not a store needs a tokenizer")
    return build_store(inputs, tokenizer)[0]


def _check_pairs(store: Store) -> None:
    sizes = np.diff(store.completion_offsets())
    if (sizes == 2).all() and (store.roles().reshape(-1, 2) == PAIR).all():
        return
    raise ColumnsError(
        "some groups are not a pair of chosen and rejected: use the shape 'completions'"
    )


def _check_turns(store: Store) -> None:
    if wrong := int(with_weights(store).sum()):
        raise ColumnsError(
            f"the table has a mask for tokens, and no weights: in {count(wrong, 'group')}, turns "
            "have a `weight` other than 0 and 1. Remove them, or train with `logratio train`"
        )


@dataclass(frozen=True)
class ReferenceTable:
    """Groups and their reference log-probs, read again for every use; see `reference_table`.

    Libraries that support `__arrow_c_stream__` can read it directly (polars, duckdb, pyarrow). Only
    about a million tokens are in memory at a time.

    Attributes:
        logps: The store and its log-probs.
        shape: ``pairs`` or ``completions``.
        per_token: Whether there are columns of per-token log-probs.
    """

    logps: CachedLogps
    shape: Shape = "pairs"
    per_token: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        """Prefixes of the columns of completions."""
        return ("chosen", "rejected") if self.shape == "pairs" else ("completion",)

    @property
    def masked(self) -> bool:
        """Whether some tokens are excluded from the loss, so that there are mask columns."""
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
            CorruptStoreError, CorruptCacheError: The store or the cache is damaged.
        """
        pa = arrow("A table of reference log-probs")
        schema, files = self.schema, source_files(self.logps.store)
        for layout in self.logps.chunks():
            chunk = TableChunk(layout, self.logps, files)
            columns = chunk.pairs() if self.shape == "pairs" else chunk.completions()
            yield pa.record_batch([columns[name]() for name in schema.names], schema=schema)

    def to_parquet(self, path: str | Path) -> None:
        """Write a Parquet file atomically.

        Raises:
            OSError: The file cannot be written.
        """
        pq, schema = arrow("Parquet").parquet, self.schema
        with published(Path(path)) as partial, pq.ParquetWriter(str(partial), schema) as writer:
            for batch in self.batches():
                writer.write_batch(batch)

    def to_dataset(self, path: str | Path | None = None) -> Any:
        """Return a `datasets.Dataset`.

        Args:
            path: An Arrow file to write and memory-map; None: keep all rows in memory.

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
        """Export the rows to another library as a stream of record batches."""
        reader = arrow("A table").RecordBatchReader.from_batches(self.schema, self.batches())
        return reader.__arrow_c_stream__(requested_schema)


def reference_name(side: str) -> str:
    """Return the prefix of a side's reference columns, as in TRL."""
    return "ref" if side == "completion" else f"ref_{side}"
