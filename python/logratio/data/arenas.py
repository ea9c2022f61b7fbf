"""Buffers for batches, used again and again: fresh memory costs more than filling it."""

from collections import deque
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray


class _Loan(ref[NDArray[np.uint8]]):
    """Knows which memory an array was lent, to the array's end and a moment longer."""

    __slots__ = ("storage",)
    __hash__ = object.__hash__
    storage: NDArray[np.uint8]


class Arenas:
    """Buffers that come back by themselves when nothing refers to what is in them any more.

    A batch that is kept (in a list, in an autograd graph) keeps its buffer, and another is made:
    no batch is ever overwritten while someone can still read it. A reader who drops each batch
    before the next but one needs three buffers in all.
    """

    def __init__(self) -> None:
        self._loans: set[_Loan] = set()
        # Loans that ended. Their callback is `append` itself: one written in Python could be where
        # Ctrl-C strikes, and what a callback raises is lost.
        self._ended: deque[ref[NDArray[np.uint8]]] = deque()

    def __call__(self, nbytes: int) -> NDArray[np.uint8]:
        """Lend a buffer of `nbytes` bytes, uint8 `[nbytes]`, with whatever was in it."""
        storage = self._take(nbytes)
        # Views of an array are views of its owner, but not through a memoryview: every view of
        # `lent` keeps `lent` itself alive, and its end is the end of them all.
        lent = np.frombuffer(storage.data, np.uint8, nbytes)
        loan = _Loan(lent, self._ended.append)
        loan.storage = storage
        self._loans.add(loan)
        return lent

    def _take(self, nbytes: int) -> NDArray[np.uint8]:
        while self._ended:
            loan = self._ended.popleft()
            assert isinstance(loan, _Loan)
            self._loans.discard(loan)
            if len(loan.storage) >= nbytes:
                return loan.storage
        return np.empty(nbytes + nbytes // 4, np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process begins with no buffers."""
        return Arenas, ()
