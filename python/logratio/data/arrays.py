"""Groups as flat arrays, the way a store takes many at once."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, StoreWriter
from logratio.data.groups import TokenizedGroup
from logratio.data.records import CHOSEN, REJECTED, Source

KEPT, DUPLICATE, CONFLICT = range(3)
"""What became of a group: written; said before, so not written; written though the opposite was."""

PAIR = np.array([ROLES.index(CHOSEN), ROLES.index(REJECTED)], np.uint8)
"""The roles of a pair."""


@dataclass(frozen=True, slots=True)
class GroupArrays:
    """`G` groups of `N` completions, ids end to end.

    Attributes:
        prompt_ids: int32, every prompt.
        prompt_lengths: uint32 `[G]`.
        completion_ids: int32, every completion, group after group.
        completion_mask: uint8, 1 where a completion's token counts.
        completion_lengths: uint32 `[N]`.
        group_sizes: uint32 `[G]`, completions of each group.
        roles: uint8 `[N]`, index into `logratio._rust.ROLES`.
        files: uint32 `[G]`, number of the source file.
        lines: uint64 `[G]`, line in it.
    """

    prompt_ids: NDArray[np.int32]
    prompt_lengths: NDArray[np.uint32]
    completion_ids: NDArray[np.int32]
    completion_mask: NDArray[np.uint8]
    completion_lengths: NDArray[np.uint32]
    group_sizes: NDArray[np.uint32]
    roles: NDArray[np.uint8]
    files: NDArray[np.uint32]
    lines: NDArray[np.uint64]

    @classmethod
    def of(
        cls, groups: Sequence[TokenizedGroup], file_number: Callable[[Source], int]
    ) -> "GroupArrays":
        """Lay groups end to end; `file_number` numbers their sources' files."""
        completions = [completion for group in groups for completion in group.completions]
        return cls(
            _flat((group.prompt_ids for group in groups), np.int32),
            _array((len(group.prompt_ids) for group in groups), np.uint32),
            _flat((completion.ids for completion in completions), np.int32),
            _flat((completion.mask for completion in completions), np.uint8),
            _array((len(completion.ids) for completion in completions), np.uint32),
            _array((len(group.completions) for group in groups), np.uint32),
            _array((_ROLE[completion.role] for completion in completions), np.uint8),
            _array((file_number(group.source) for group in groups), np.uint32),
            _array((group.source.line for group in groups), np.uint64),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def push(self, writer: StoreWriter) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Write the groups.

        Returns:
            What became of each, uint8 `[G]`, and the group that said it or its opposite before,
            int64 `[G]`, -1 where none did.
        """
        return writer.push_many(*(getattr(self, field.name) for field in fields(self)))


_ROLE = {name: number for number, name in enumerate(ROLES)}


def _array(values: Iterable[int], dtype: Any) -> NDArray[Any]:
    return np.fromiter(values, dtype)


def _flat(parts: Iterable[Sequence[int]], dtype: Any) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(parts), dtype)
