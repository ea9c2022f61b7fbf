"""Stores of groups of given lengths."""

import numpy as np

from logratio._rust import Store, StoreWriter


def make_store(lengths: list[int], files: list[int] | None = None) -> Store:
    """Store groups of these lengths: half the tokens prompt, half one completion."""
    writer = StoreWriter()
    for number, length in enumerate(lengths):
        prompt = (length + 1) // 2
        writer.push(
            np.full(prompt, 5, np.int32),
            np.full(length - prompt, number, np.int32),
            np.ones(length - prompt, np.uint8),
            np.array([length - prompt], np.uint32),
            np.zeros(1, np.uint8),
            files[number] if files else 0,
            number,
        )
    return writer.finish()
