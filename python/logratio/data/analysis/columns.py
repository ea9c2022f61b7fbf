"""A store's columns as arrays, and which completions of it are compared."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, Store
from logratio.data.records import CANDIDATE, CHOSEN, REJECTED

_CHOSEN, _REJECTED, _CANDIDATE = map(ROLES.index, (CHOSEN, REJECTED, CANDIDATE))


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What is known of every group without its tokens.

    Attributes:
        prompts: Tokens of each prompt: u32 [G].
        completions: Tokens of each completion: u32 [N].
        counted: Of these, tokens that count: u32 [N].
        offsets: Where the completions of each group begin, and N: i64 [G+1].
        roles: Role number of each completion: u8 [N].
    """

    prompts: NDArray[np.uint32]
    completions: NDArray[np.uint32]
    counted: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    roles: NDArray[np.uint8]

    @classmethod
    def of(cls, store: Store) -> "Columns":
        """Read the columns of a store: some 30 bytes a pair."""
        return cls(
            store.prompt_lengths(),
            store.completion_lengths(),
            store.counted_lengths(),
            store.completion_offsets(),
            store.roles(),
        )

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.prompts)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Completions of each group: i64 [G]."""
        return np.diff(self.offsets)

    def compared(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the completions that are compared, the better and the worse: i64 [C], i64 [C].

        Of a pair these are chosen and rejected, of a list from the best to the worst its two ends.
        """
        several = self.sizes > 1
        first, last = self.offsets[:-1][several], self.offsets[1:][several] - 1
        is_ordered = np.isin(self.roles[first], (_CHOSEN, _CANDIDATE))
        is_ordered &= np.isin(self.roles[last], (_REJECTED, _CANDIDATE))
        return first[is_ordered], last[is_ordered]

    def judged_alone(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the completions with a thumb up or down and no sibling: i64 [A], i64 [B]."""
        single = self.offsets[:-1][self.sizes == 1]
        roles = self.roles[single]
        return single[roles == _CHOSEN], single[roles == _REJECTED]

    def are_pairs(self) -> bool:
        """Say whether every group is one chosen and one rejected completion."""
        return (
            self.groups > 0
            and bool((self.sizes == 2).all())
            and bool((self.roles[::2] == _CHOSEN).all())
            and bool((self.roles[1::2] == _REJECTED).all())
        )

    def longest(self) -> NDArray[np.int64]:
        """Return the tokens of each group's longest sequence, prompt and completion: i64 [G]."""
        if not self.groups:
            return np.zeros(0, np.int64)
        longest = np.maximum.reduceat(self.completions, self.offsets[:-1])
        return np.add(self.prompts, longest, dtype=np.int64)

    def together(self) -> NDArray[np.int64]:
        """Return the tokens of each group, its prompt once: i64 [G]."""
        if not self.groups:
            return np.zeros(0, np.int64)
        answers = np.add.reduceat(self.completions, self.offsets[:-1], dtype=np.int64)
        return np.add(self.prompts, answers, dtype=np.int64)
