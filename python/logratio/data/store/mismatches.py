"""Add another prompt's answer to every group: the reference point of KTO (arXiv 2402.01306).

KTO compares a reward with the divergence between policy and reference, which it estimates from
answers to other prompts. The pairs of groups are drawn once, so that their reference log-probs can
be computed, cached and resumed like all others.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logratio._rust import ROLES, SharedLayout, Store, StoreWriter
from logratio.data.store.slices import SLICE_FIELDS, alternating, firsts, prompt_ids, slices
from logratio.data.store.turn_weights import whole_mask
from logratio.data.tokenization.groups import GroupArrays, no_values
from logratio.errors import ConfigError

MISMATCHED = ROLES.index("mismatched")


def with_mismatches(store: Store, seed: int, path: Path | None, max_length: int) -> Store:
    """Write a store of the same groups, each followed by the answer to another prompt.

    The additional completion has the role ``mismatched``, and is the first completion of another
    group, each of whose counted tokens counts once. The groups are assigned by a random
    permutation, and no group gets an answer to its own prompt. If more than half of the groups
    share a prompt, no permutation does that: the answers to other prompts are then used several
    times.

    Args:
        store: The groups.
        seed: Seed of the assignment.
        path: Path of the new store. None: in memory.
        max_length: Most tokens of a prompt and the additional completion, which is truncated. Its
            loss mask is truncated with it; if no token of it counts then, all do.

    Returns:
        The new store, with the sources, values and metadata of the old one.

    Raises:
        ConfigError: All groups have the same prompt, or a prompt leaves no room within
            `max_length`.
        CorruptStoreError: The store is damaged.
        OSError: The new store cannot be written.

    Example:
        >>> whole = with_mismatches(store, seed=0, path=None, max_length=1024)
    """
    longest = int(store.prompt_lengths().max(initial=0))
    if longest >= max_length:
        raise ConfigError(
            f"--max-length is {max_length}, but a prompt has {longest} tokens and needs an answer: "
            "raise --max-length, or build the store again with a smaller --max-prompt-length"
        )
    partners = mismatched_groups(_prompt_hashes(store), seed)
    values, (files, lines) = store.values(), store.sources()
    writer = StoreWriter(path)
    try:
        for first, stop in slices(store):
            own = store.shared_layout(np.arange(first, stop), fields=SLICE_FIELDS)
            other = store.shared_layout(partners[first:stop], fields=SLICE_FIELDS)
            sources = files[first:stop], lines[first:stop]
            mask = whole_mask(store, own)
            _joined(own, mask, other, values[own.completions], sources, max_length).push(writer)
        return writer.finish(store.metadata)
    finally:
        writer.close()


def mismatched_groups(prompts: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
    """Assign to each group another one with a different prompt.

    Args:
        prompts: `[G]`, equal for groups with equal prompts.
        seed: Seed of the assignment.

    Returns:
        int64 `[G]`: a permutation, unless more than half of the groups share a prompt.

    Raises:
        ConfigError: There are fewer than two prompts.
    """
    _, kind, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ConfigError(
            "KTO compares each answer with one to another prompt, but the data has "
            f"{len(sizes)} prompt{'' if len(sizes) == 1 else 's'}: add data with other prompts"
        )
    random, groups, most = np.random.default_rng(seed), len(prompts), int(sizes.max())
    place = random.permutation(len(sizes))
    place[sizes.argmax()] = -1  # the most frequent prompt comes first
    order = random.permutation(groups)
    order = order[np.argsort(place[kind[order]], kind="stable")]
    # Groups with one prompt are adjacent now, and at most `most`: so many places further is another
    # prompt. If the first prompt has more than half of the groups, the others are used in turn.
    shifted = np.arange(most, most + groups) % groups
    rest = groups - most
    if most > rest:
        shifted[:most] = most + np.arange(most) % rest
    partners = np.empty(groups, np.int64)
    partners[order] = order[shifted]
    return partners


def _prompt_hashes(store: Store) -> NDArray[np.uint64]:
    """Hash the ids of every prompt: uint64 `[G]`.

    Prompts with equal hashes count as equal, so a collision only excludes one more partner.
    """
    lengths = store.prompt_lengths()
    random = np.random.default_rng(0)
    factors = random.integers(1, 1 << 63, int(lengths.max(initial=0)), np.uint64)
    hashes = np.empty(len(store), np.uint64)
    for first, stop in slices(store):
        layout = store.shared_layout(np.arange(first, stop), fields=SLICE_FIELDS)
        ids, own = prompt_ids(layout), lengths[first:stop].astype(np.int64)
        starts = np.cumsum(own) - own
        places = np.arange(len(ids)) - np.repeat(starts, own)
        terms = (ids.astype(np.uint64) + np.uint64(1)) * factors[places]
        hashes[first:stop] = np.add.reduceat(terms, starts)
    return hashes


def _joined(
    own: SharedLayout,
    own_mask: NDArray[np.uint8],
    other: SharedLayout,
    values: NDArray[np.float32],
    sources: tuple[NDArray[np.uint32], NDArray[np.uint64]],
    max_length: int,
) -> GroupArrays:
    """Build groups, each followed by the first completion of the group at the same place."""
    ids, mask, lengths = _cut(other, max_length - own.prompt_lengths)
    answers = np.add.reduceat(own.completion_lengths, firsts(own))
    is_added = alternating(answers, lengths)  # of tokens
    is_new = alternating(own.group_sizes, np.ones_like(own.group_sizes))  # of completions
    tokens, completions = len(is_added), len(is_new)
    every_id, every_mask = np.empty(tokens, np.int32), np.empty(tokens, np.uint8)
    every_id[~is_added], every_id[is_added] = own.target_ids, ids
    every_mask[~is_added], every_mask[is_added] = own_mask, mask
    every_length = np.empty(completions, np.uint32)
    every_length[~is_new], every_length[is_new] = own.completion_lengths, lengths
    roles = np.full(completions, MISMATCHED, np.uint8)
    roles[~is_new] = own.roles
    every_value = no_values(completions)
    every_value[~is_new] = values
    return GroupArrays(
        prompt_ids(own),
        own.prompt_lengths.astype(np.uint32),
        every_id,
        every_mask,
        every_length,
        (own.group_sizes + 1).astype(np.uint32),
        roles,
        *sources,
        every_value,
    )


def _cut(
    layout: SharedLayout, room: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Return ids, mask and lengths of each group's first completion, of at most `room` tokens."""
    first = firsts(layout)
    lengths = np.minimum(layout.completion_lengths[first], room)
    starts = np.cumsum(lengths) - lengths
    shift = np.repeat(layout.completion_offsets[first] - starts, lengths)
    places = np.arange(int(lengths.sum())) + shift
    mask = layout.completion_mask[places].copy()
    is_blank = ~np.logical_or.reduceat(mask, starts)
    mask |= np.repeat(is_blank, lengths)
    return layout.target_ids[places], mask, lengths
