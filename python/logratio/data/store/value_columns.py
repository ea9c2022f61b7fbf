"""Scores, margins and weights of pairs in a table, read as columns instead of row by row."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from logratio._rust import VALUES
from logratio.data.formats.catalogue import MARGIN, SIDE_SCORES, WEIGHT
from logratio.data.formats.values import FLOAT32_MAX

if TYPE_CHECKING:
    import pyarrow

_SCORE, _MARGIN, _WEIGHT = (VALUES.index(name) for name in ("score", "margin", "weight"))


@dataclass(frozen=True, slots=True)
class ValueColumns:
    """The columns of a table of pairs that hold numbers.

    Attributes:
        names: The columns that are read.
        scores: The names of the scores of both sides. None: the table has none.
        is_simple: Whether they are columns of numbers, which `read` can read. Otherwise every row
            must be read by itself.
    """

    names: frozenset[str]
    scores: tuple[str, str] | None
    is_simple: bool

    @classmethod
    def of(cls, schema: "pyarrow.Schema") -> "ValueColumns":
        """Find the columns in a table's schema."""
        import pyarrow as pa

        scores = [names for names in SIDE_SCORES if not {*names}.isdisjoint(schema.names)]
        names = {name for pair in scores for name in pair} | {MARGIN, WEIGHT}
        names &= {*schema.names}
        kinds = [schema.field(name).type for name in names]
        are_numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds)
        return cls(frozenset(names), scores[0] if scores else None, are_numbers and len(scores) < 2)

    def read(self, batch: "pyarrow.RecordBatch") -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Read the numbers of a batch, as `formats.values.with_values` would.

        Returns:
            float32 `[2R, 4]`, the values of chosen and rejected of each row; and bool `[R]`, the
            rows to read by themselves, because a number is refused, unreadable or warned about.
        """
        values = np.full((batch.num_rows, 2, len(VALUES)), np.nan)
        for side, name in enumerate(self.scores or ()):
            values[:, side, _SCORE] = _numbers(batch, name)
        margin = _numbers(batch, MARGIN)
        with np.errstate(invalid="ignore"):  # infinity minus infinity, in a row that is odd
            difference = values[:, 0, _SCORE] - values[:, 1, _SCORE]
        values[:, 0, _MARGIN] = np.where(np.isnan(margin), difference, margin)
        weight = _numbers(batch, WEIGHT)
        values[:, :, _WEIGHT] = weight[:, None]
        odd = (values[:, 0, _MARGIN] < 0) | (weight < 0)
        odd |= (np.abs(values) > FLOAT32_MAX).any(axis=(1, 2))
        values[odd] = np.nan
        return values.reshape(-1, len(VALUES)).astype(np.float32), odd


def _numbers(batch: "pyarrow.RecordBatch", name: str) -> NDArray[np.float64]:
    """Return a column as float64 `[R]`, with NaN for null; all NaN if the table lacks it."""
    import pyarrow as pa

    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    numbers = batch.column(name).cast(pa.float64(), safe=False)
    return np.asarray(numbers.to_numpy(zero_copy_only=False), np.float64)
