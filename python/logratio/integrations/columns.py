"""A store's groups with the reference's log-probs beside them, as a table for any trainer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from logratio._rust import Store
from logratio.data import PreferenceTokenizer, build_store, is_store
from logratio.data.arrays import PAIR
from logratio.data.containers import Inputs, as_inputs
from logratio.data.containers.arrow_library import arrow
from logratio.durable import published
from logratio.errors import LogratioError
from logratio.extras import require
from logratio.integrations.lookup import CachedLogps, open_reference
from logratio.integrations.stretch import Stretch, source_files

if TYPE_CHECKING:
    import pyarrow

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
