"""Stores written group by group through the compiled module."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, StoreWriter


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def u8(*values: int) -> NDArray[np.uint8]:
    return np.array(values, dtype=np.uint8)


def u32(*values: int) -> NDArray[np.uint32]:
    return np.array(values, dtype=np.uint32)


def f32(rows: list[list[float]]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32)


def push_pair(writer: StoreWriter, first: int = 1) -> None:
    """Add a prompt of three ids, a chosen completion of one and a rejected one of three."""
    completion_ids = ids(*range(first + 3, first + 7))
    writer.push(
        ids(*range(first, first + 3)), completion_ids, u8(1, 1, 0, 1), u32(1, 3), u8(0, 1), 2, 9
    )


def make_store(path: Path | None = None) -> Store:
    """Make a store of one pair and one demonstration."""
    writer = StoreWriter(path)
    push_pair(writer)
    writer.push(ids(90), ids(80, 81), u8(1, 1), u32(2), u8(3), 2, 10)
    return writer.finish('{"files": ["a.jsonl"]}')
