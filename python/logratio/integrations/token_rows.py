"""Store the token ids that another trainer feeds to its model, to look up their log-probs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, StoreWriter
from logratio.data.tokenization.groups import PAIR, GroupArrays, no_values
from logratio.errors import LogratioError

FED = {"input_ids", "attention_mask", "completion_mask"}
"""Allowed outputs of a collator: any other input could change log-probs, but is not in the keys."""

Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


class ForeignRowsError(LogratioError, ValueError):
    """The collator feeds the model more than token ids, so the cache cannot be used."""


@dataclass(frozen=True)
class TokenRows:
    """`R` pairs as a store.

    Attributes:
        store: One completion for each side with loss tokens.
        completions: Index of the chosen and rejected completion in the store, int64 `[R, 2]`; -1
            for a side without loss tokens.
    """

    store: Store
    completions: NDArray[np.int64]


@dataclass(frozen=True)
class _Sides:
    """`2B` sequences of length `T`, alternately chosen and rejected.

    Attributes:
        ids: Token ids, int32 `[2B, T]`.
        prompt, completion: Masks of the tokens before and from the first loss token, bool
            `[2B, T]`.
        counts: Mask of the loss tokens, bool `[2B, T]`.
    """

    ids: NDArray[np.int32]
    prompt: NDArray[np.bool_]
    completion: NDArray[np.bool_]
    counts: NDArray[np.bool_]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "_Sides":
        """Convert a collated batch, in which all chosen sequences precede the rejected ones."""
        ids, fed, counts = (
            _interleaved(batch[name]) for name in ("input_ids", "attention_mask", "completion_mask")
        )
        fed, counts = fed == 1, counts == 1
        place = np.cumsum(fed, axis=1) - 1
        # No token predicts the first one: trainers shift it away.
        counts &= fed & (place > 0)
        first = np.where(counts.any(axis=1), np.argmax(counts, axis=1), 0)
        start = np.take_along_axis(place, first[:, None], axis=1)
        completion = fed & (place >= start) & counts.any(axis=1)[:, None]
        return cls(ids.astype(np.int32), fed & ~completion, completion, counts)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Whether each sequence has loss tokens, bool `[2B]`."""
        return np.asarray(self.completion.any(axis=1))

    def same_prompt(self) -> NDArray[np.bool_]:
        """Return which pairs have the same prompt and loss tokens on both sides, bool `[B]`."""
        prompts = np.where(self.prompt, self.ids, -1)
        same: NDArray[np.bool_] = (prompts[::2] == prompts[1::2]).all(axis=1)
        same &= self.scored[::2] & self.scored[1::2]
        return same

    def arrays(self, first_row: int) -> GroupArrays:
        """Convert to groups: a pair if the prompts are equal, otherwise one group per side."""
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
            no_values(int(scored.sum())),
        )


def _interleaved(tensor: Any) -> NDArray[Any]:
    """Interleave the first and second half of the rows, `[2B, T]`."""
    rows = np.asarray(tensor)
    return rows.reshape(2, len(rows) // 2, -1).swapaxes(0, 1).reshape(rows.shape)


def token_rows(
    batches: Iterable[Sequence[dict[str, Any]]], collate: Collate, path: Path | None = None
) -> TokenRows:
    """Write rows to a store exactly as a trainer's collator feeds them to its model.

    Args:
        batches: Batches of rows, the input of the collator.
        collate: Returns `input_ids`, `attention_mask` and `completion_mask` of `B` rows: int64
            `[2B, T]` each, all chosen sequences before the rejected ones, padded on either side.
            Its truncation applies here too.
        path: Path of the store; None: in memory.

    Raises:
        ForeignRowsError: The collator feeds the model more than token ids.
    """
    writer, numbers, row, written = StoreWriter(path), [], 0, 0
    try:
        for rows in batches:
            batch = collate(list(rows))
            if extra := batch.keys() - FED:
                raise ForeignRowsError(
                    f"the collator feeds {', '.join(sorted(extra))} to the model, more than ids"
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
