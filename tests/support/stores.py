"""Stores made of groups in memory."""

import numpy as np

from logratio._rust import Store, StoreWriter


def store_of(*groups: tuple[int, list[int]]) -> Store:
    """A store of groups with so many prompt tokens and completions of such lengths."""
    writer = StoreWriter()
    for line, (prompt, completions) in enumerate(groups):
        total = sum(completions)
        writer.push(
            np.full(prompt, line, dtype=np.int32),
            np.arange(total, dtype=np.int32),
            np.ones(total, dtype=np.uint8),
            np.array(completions, dtype=np.uint32),
            np.full(len(completions), 2, dtype=np.uint8),
            0,
            line,
        )
    return writer.finish()
