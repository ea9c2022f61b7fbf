"""Rows as another trainer feeds them to its model, as a store: the same ids, so the same keys."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, StoreWriter
from logratio.data.tokenization.groups import PAIR, GroupArrays
from logratio.errors import LogratioError

FED = {"input_ids", "attention_mask", "completion_mask"}
"""What a collator may feed to a model: anything else could move a log-prob, and is in no key."""

Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


class ForeignRowsError(LogratioError, ValueError):
    """Rows are fed to the model in a way that a cache of token ids knows nothing of."""


@dataclass(frozen=True)
class TokenRows:
    """`R` pairs as a store.

    Attributes:
        store: A completion for each side that has a token to score.
        completions: int64 `[R, 2]`, the number of the chosen and the rejected completion in the
            store; -1 where a side has no token to score.
    """

    store: Store
    completions: NDArray[np.int64]


@dataclass(frozen=True)
class _Sides:
    """`2B` sequences, chosen and rejected by turns, in rows of `T`.

    Attributes:
        ids: int32 `[2B, T]`.
        prompt, completion: bool `[2B, T]`, the tokens before and from the first scored one on.
        counts: bool `[2B, T]`, the tokens that are scored.
    """

    ids: NDArray[np.int32]
    prompt: NDArray[np.bool_]
    completion: NDArray[np.bool_]
    counts: NDArray[np.bool_]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "_Sides":
        """Read a batch of a collator that puts all chosen before all rejected sequences."""
        ids, fed, counts = (
            _by_turns(batch[name]) for name in ("input_ids", "attention_mask", "completion_mask")
        )
        fed, counts = fed == 1, counts == 1
        place = np.cumsum(fed, axis=1) - 1
        # What stands first is predicted by nothing: trainers shift it away.
        counts &= fed & (place > 0)
        first = np.where(counts.any(axis=1), np.argmax(counts, axis=1), 0)
        start = np.take_along_axis(place, first[:, None], axis=1)
        completion = fed & (place >= start) & counts.any(axis=1)[:, None]
        return cls(ids.astype(np.int32), fed & ~completion, completion, counts)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Which sequences have a token to score: bool `[2B]`."""
        return np.asarray(self.completion.any(axis=1))

    def same_prompt(self) -> NDArray[np.bool_]:
        """Say of which pairs both sides are scored behind one and the same prompt: bool `[B]`."""
        prompts = np.where(self.prompt, self.ids, -1)
        same: NDArray[np.bool_] = (prompts[::2] == prompts[1::2]).all(axis=1)
        same &= self.scored[::2] & self.scored[1::2]
        return same

    def arrays(self, first_row: int) -> GroupArrays:
        """Lay them out as groups: a pair where the prompt is one, else each side by itself."""
        scored, same = self.scored, self.same_prompt()
        pairs = np.repeat(same, 2)
        leads = scored.copy()
        leads[1::2] &= ~same
        groups = np.flatnonzero(leads)
        return GroupArrays(
            self.ids[self.prompt & leads[:, None]],
            self.prompt.sum(axis=1)[leads].astype(np.uint32),
            self.ids[self.completion],
            self.counts[self.completion].astype(np.uint8),
            self.completion.sum(axis=1)[scored].astype(np.uint32),
            np.where(pairs[leads], 2, 1).astype(np.uint32),
            np.tile(PAIR, len(same))[scored],
            np.zeros(len(groups), np.uint32),
            (first_row + groups // 2).astype(np.uint64),
        )


def _by_turns(tensor: Any) -> NDArray[Any]:
    """Put row B+i behind row i: `[2B, T]`."""
    rows = np.asarray(tensor)
    return rows.reshape(2, len(rows) // 2, -1).swapaxes(0, 1).reshape(rows.shape)


def token_rows(
    batches: Iterable[Sequence[dict[str, Any]]], collate: Collate, path: Path | None = None
) -> TokenRows:
    """Write rows to a store, as a trainer's own collator feeds them to its model.

    Args:
        batches: Rows as the collator takes them.
        collate: Makes `input_ids`, `attention_mask` and `completion_mask` of `B` rows: int64
            `[2B, T]` each, all chosen sequences before all rejected ones, padded on either side.
            What it cuts is cut here.
        path: Where the store is to be; None: in memory.

    Raises:
        ForeignRowsError: The collator feeds the model something else beside token ids.
    """
    writer, numbers, row, written = StoreWriter(path), [], 0, 0
    try:
        for rows in batches:
            batch = collate(list(rows))
            if extra := batch.keys() - FED:
                raise ForeignRowsError(
                    f"the collator feeds {', '.join(sorted(extra))} to the model beside token ids"
                )
            sides = _Sides.of(batch)
            sides.arrays(row + 1).push(writer)
            scored = sides.scored
            numbers.append(np.where(scored, written + np.cumsum(scored) - 1, -1))
            row += len(rows)
            written += int(scored.sum())
        flat = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        return TokenRows(writer.finish(), flat.reshape(-1, 2))
    finally:
        writer.close()
