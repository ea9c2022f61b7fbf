"""Rank with Ray Data: a class for `Dataset.map_batches`, for tables of a cluster's size."""

from pathlib import Path
from typing import Any

from logratio.data.records import Source
from logratio.serving.rank_rows import RankSummary, checked, flat, ranked_rows
from logratio.serving.reranker import Reranker

_ERRORS = [("index", "int64"), ("error", "string")]


class RankBatch:
    """Score the rows of a table, as `rank_file` does those of a file.

    Example:
        ::

            import ray
            from logratio.serving import RankBatch

            rows = ray.data.read_parquet("candidates")
            ranked = rows.map_batches(
                RankBatch,
                fn_constructor_args=["bundle"],
                batch_format="pyarrow",
                batch_size=256,
                concurrency=4,
            )
            ranked.write_parquet("ranked")
    """

    def __init__(self, bundle: str | Path, **settings: Any) -> None:
        """Load a bundle in a worker.

        Args:
            bundle: The bundle's folder, which every host can read.
            settings: Arguments of `Reranker.load`, for example ``providers`` or ``threads``.
        """
        self._reranker = Reranker.load(bundle, **settings)

    def __call__(self, table: Any) -> Any:
        """Score the rows of a `pyarrow.Table` with the columns ``prompt`` and ``candidates``.

        Returns:
            The table with the columns of `rank_file`; ``errors`` is a list of structs ``{index,
            error}``.
        """
        import pyarrow

        items = [checked(row, Source("table", n)) for n, row in enumerate(table.to_pylist(), 1)]
        rows = [flat(row) for row in ranked_rows(self._reranker, items, RankSummary())]
        errors = pyarrow.list_(pyarrow.struct([(name, kind) for name, kind in _ERRORS]))
        types = {
            "rewards": pyarrow.list_(pyarrow.float64()),
            "order": pyarrow.list_(pyarrow.int64()),
            "policy_logps": pyarrow.list_(pyarrow.float64()),
            "reference_logps": pyarrow.list_(pyarrow.float64()),
            "tokens": pyarrow.list_(pyarrow.int64()),
            "errors": errors,
            "truncated": pyarrow.list_(pyarrow.int64()),
            "error": pyarrow.string(),
        }
        for name, kind in types.items():
            column = pyarrow.array([row.get(name) for row in rows], kind)
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, column)
        return table
