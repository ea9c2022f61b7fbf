"""Take pairs apart into single answers with labels, as methods for labelled answers need."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, Store, StoreWriter
from logratio.data.store.load import source_names
from logratio.data.store.slices import SLICE_FIELDS, prompt_ids, slices
from logratio.data.store.turn_weights import whole_mask
from logratio.data.tokenization.groups import GroupArrays
from logratio.errors import ConfigError

CHOSEN, REJECTED = map(ROLES.index, ("chosen", "rejected"))


def are_pairs(store: Store) -> NDArray[np.bool_]:
    """Return whether each group is a chosen and a rejected answer, bool `[G]`."""
    offsets, roles = store.completion_offsets(), store.roles()
    starts = offsets[:-1]
    second = roles[np.minimum(starts + 1, len(roles) - 1)]
    pairs: NDArray[np.bool_] = (
        (np.diff(offsets) == 2) & (roles[starts] == CHOSEN) & (second == REJECTED)
    )
    return pairs


def without_pairs(store: Store, path: Path | None) -> Store:
    """Write a store in which each pair became two groups of one answer.

    The chosen answer of a pair is good and the rejected one is bad; both keep their prompt, source
    and values. Other groups stay as they are.

    Args:
        store: The groups.
        path: Path of the new store. None: in memory.

    Raises:
        ConfigError: A row of the data made several pairs, so an answer could be good and bad.
        CorruptStoreError: The store is damaged.
        OSError: The new store cannot be written.

    Example:
        >>> answers = without_pairs(store, path=None)
        >>> len(answers) == 2 * len(store)
        True
    """
    split = are_pairs(store)
    _refuse_lists(store, split)
    values, sources = store.values(), store.sources()
    writer = StoreWriter(path)
    try:
        for first, stop in slices(store):
            rows = np.arange(first, stop)
            copies = np.repeat(rows, np.where(split[first:stop], 2, 1))
            _answers(store, copies, split, values, sources).push(writer)
        return writer.finish(store.metadata)
    finally:
        writer.close()


def _refuse_lists(store: Store, split: NDArray[np.bool_]) -> None:
    """Refuse pairs of one list: its answers between the best and the worst are on both sides."""
    files, lines = (column[split] for column in store.sources())
    places = np.flatnonzero(split)
    order = np.lexsort((lines, files))
    same = (np.diff(files[order]) == 0) & (np.diff(lines[order]) == 0)
    if same.any():
        (place,) = source_names(store, [int(places[order[same.argmax()]])])
        raise ConfigError(
            f"the row {place} makes several pairs, so the same answer would be good and bad: give "
            "--lists best_worst for one pair of each list, or a method for lists, such as --loss "
            "plackett-luce"
        )


def _answers(
    store: Store,
    copies: NDArray[np.int64],
    split: NDArray[np.bool_],
    values: NDArray[np.float32],
    sources: tuple[NDArray[np.uint32], NDArray[np.uint64]],
) -> GroupArrays:
    """Build groups from rows of the store, where a pair occurs twice: once for each answer."""
    layout = store.shared_layout(copies, fields=SLICE_FIELDS)
    sizes = layout.group_sizes
    is_second = np.concatenate([[False], copies[1:] == copies[:-1]])
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # A group that is no pair keeps all of its answers.
    kept = (place == np.repeat(is_second, sizes)) | ~np.repeat(split[copies], sizes)
    tokens = np.repeat(kept, layout.completion_lengths)
    files, lines = sources
    return GroupArrays(
        prompt_ids(layout),
        layout.prompt_lengths.astype(np.uint32),
        layout.target_ids[tokens].astype(np.int32),
        whole_mask(store, layout)[tokens],
        layout.completion_lengths[kept].astype(np.uint32),
        np.where(split[copies], 1, sizes).astype(np.uint32),
        layout.roles[kept].astype(np.uint8),
        files[copies],
        lines[copies],
        values[layout.completions[kept]],
    )
