"""An independent implementation of both layouts, token by token."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Store, StoreWriter

Completion = tuple[list[int], list[int], int]
"""Token ids, 1 where a token counts, number of the role."""

Group = tuple[list[int], list[Completion]]
"""The prompt's ids and its completions."""


@dataclass(frozen=True)
class Options:
    """How to lay out."""

    side: str = "right"
    multiple_of: int = 1
    width: int | None = None
    pad_id: int = 0

    def fitted(self, needed: int) -> int:
        """Return the width for what is needed."""
        wanted = needed if self.width is None else self.width
        return -(-wanted // self.multiple_of) * self.multiple_of


def store_of(groups: list[Group]) -> Store:
    """Store `groups` in memory."""
    writer = StoreWriter()
    for line, (prompt, completions) in enumerate(groups):
        writer.push(
            np.array(prompt, np.int32),
            np.array([i for ids, _, _ in completions for i in ids], np.int32),
            np.array([m for _, mask, _ in completions for m in mask], np.uint8),
            np.array([len(ids) for ids, _, _ in completions], np.uint32),
            np.array([role for _, _, role in completions], np.uint8),
            0,
            line,
        )
    return writer.finish()


def targets(groups: list[Group], numbers: list[int]) -> dict[str, NDArray[np.generic]]:
    """Return the arrays that both layouts share."""
    chosen = [groups[number] for number in numbers]
    each = [completion for _, completions in chosen for completion in completions]
    first = [sum(len(completions) for _, completions in groups[:number]) for number in numbers]
    lengths = [len(ids) for ids, _, _ in each]
    flat: dict[str, tuple[list[int], type]] = {
        "target_ids": ([i for ids, _, _ in each for i in ids], np.int64),
        "completion_mask": ([m for _, mask, _ in each for m in mask], np.bool_),
        "completion_of": ([n for n, length in enumerate(lengths) for _ in range(length)], np.int64),
        "completion_offsets": ([sum(lengths[:n]) for n in range(len(lengths) + 1)], np.int64),
        "prompt_lengths": ([len(prompt) for prompt, _ in chosen], np.int64),
        "completion_lengths": (lengths, np.int64),
        "group_sizes": ([len(completions) for _, completions in chosen], np.int64),
        "roles": ([role for _, _, role in each], np.uint8),
        "groups": (numbers, np.int64),
        "completions": (
            [row + k for row, g in zip(first, chosen, strict=True) for k in range(len(g[1]))],
            np.int64,
        ),
    }
    return {name: np.array(values, dtype) for name, (values, dtype) in flat.items()}


def shared(
    groups: list[Group], numbers: list[int], options: Options
) -> dict[str, NDArray[np.generic]]:
    """Return every array of the shared layout."""
    ids: list[int] = []
    positions: list[int] = []
    mask: list[int] = []
    segments: list[int] = []
    logit_index: list[int] = []
    keys: list[list[int]] = []
    for number in numbers:
        prompt, completions = groups[number]
        own = list(range(len(ids), len(ids) + len(prompt)))
        keys.append(own)
        ids += prompt
        positions += range(len(prompt))
        mask += [0] * len(prompt)
        segments += [len(keys)] * len(prompt)
        for completion, counted, _ in completions:
            start = len(ids)
            logit_index += [own[-1], *range(start, start + len(completion) - 1)]
            keys.append([*own, *range(start, start + len(completion))])
            ids += completion
            positions += range(len(prompt), len(prompt) + len(completion))
            mask += counted
            segments += [len(keys)] * len(completion)
    filler = options.fitted(len(ids)) - len(ids)
    queries = [segments.count(number + 1) for number in range(len(keys))]
    if filler:
        queries.append(filler)
        keys.append(list(range(len(ids), len(ids) + filler)))
    seen = [len(one) for one in keys]
    zeros = [0] * filler
    wide = {
        "input_ids": ids + [options.pad_id] * filler,
        "attention_mask": [1] * len(ids) + zeros,
        "position_ids": positions + zeros,
        "token_mask": mask + zeros,
        "segment_ids": segments + zeros,
        "logit_index": logit_index,
        "key_index": [key for one in keys for key in one],
        "max_seqlens": [max(queries, default=0), max(seen, default=0)],
    }
    starts = {"cu_seqlens_q": queries, "cu_seqlens_k": seen}
    return (
        targets(groups, numbers)
        | {name: np.array(values, np.int64) for name, values in wide.items()}
        | {name: np.cumsum([0, *lengths], dtype=np.int32) for name, lengths in starts.items()}
    )


def padded(
    groups: list[Group], numbers: list[int], options: Options
) -> dict[str, NDArray[np.generic]]:
    """Return every array of the padded layout."""
    most = max((len(groups[number][1]) for number in numbers), default=0)
    order = [
        (number, k) for k in range(most) for number in range(len(numbers))
        if k < len(groups[numbers[number]][1])
    ]  # fmt: skip
    rows = [(groups[numbers[number]][0], *groups[numbers[number]][1][k][:2]) for number, k in order]
    width = options.fitted(max((len(p) + len(c) for p, c, _ in rows), default=0))
    names = ("input_ids", "attention_mask", "position_ids", "token_mask", "segment_ids")
    found = {name: np.zeros((len(rows), width), np.int64) for name in names}
    found["input_ids"][:] = options.pad_id
    logit_of: dict[tuple[int, int], list[int]] = {}
    for row, (place, (prompt, completion, counted)) in enumerate(zip(order, rows, strict=True)):
        length = len(prompt) + len(completion)
        start = width - length if options.side == "left" else 0
        for at in range(length):
            cell, own = (row, start + at), at - len(prompt)
            found["input_ids"][cell] = completion[own] if own >= 0 else prompt[at]
            found["attention_mask"][cell] = 1
            found["position_ids"][cell] = at
            found["token_mask"][cell] = counted[own] if own >= 0 else 0
            found["segment_ids"][cell] = 2 if own >= 0 else 1
        first = row * width + start + len(prompt) - 1
        logit_of[place] = list(range(first, first + len(completion)))
    index = [
        i for n, number in enumerate(numbers) for k in range(len(groups[number][1]))
        for i in logit_of[n, k]
    ]  # fmt: skip
    return targets(groups, numbers) | found | {"logit_index": np.array(index, np.int64)}
