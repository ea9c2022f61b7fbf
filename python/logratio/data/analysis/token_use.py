"""Use of the vocabulary, cost of padding, and savings of shared beginnings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import Census, Store
from logratio.data.analysis.statistics import Columns

if TYPE_CHECKING:
    from logratio.data.tokenization.tokenizer import PreferenceTokenizer

_TOP = 10


@dataclass(frozen=True, slots=True)
class TokenUse:
    """Counts over all tokens of a store, each prompt once.

    Attributes:
        tokens: All tokens.
        used: Number of distinct ids.
        vocabulary: Vocabulary size. None: no tokenizer was given.
        unknown: Tokens with an id outside the vocabulary; 0 without a tokenizer.
        top: The most frequent ids, as (id, count).
        top_texts: The texts of these ids; empty without a tokenizer.
        special: Count of each special token that occurs.
        ended: Completions that end with a stop token, or with the white space that the chat
            template writes after it. None: no stop tokens are known.
        stops: The stop tokens, as text.
        completions: All completions.
        compared: Groups of two or more completions.
        same_start: Compared groups whose completions all begin with the same token.
        common: Sum over compared groups of the length of their completions' common prefix.
    """

    tokens: int
    used: int
    vocabulary: int | None
    unknown: int
    top: tuple[tuple[int, int], ...]
    top_texts: tuple[str, ...]
    special: Mapping[str, int]
    ended: int | None
    stops: tuple[str, ...]
    completions: int
    compared: int
    same_start: int
    common: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def token_use(store: Store, tokenizer: "PreferenceTokenizer | None" = None) -> TokenUse:
    """Count the tokens of a store in one pass.

    Args:
        store: The store.
        tokenizer: The store's tokenizer, which names ids. None: ids are not named.
    """
    census = Census(store)
    uses, ends = census.uses, census.ends
    top = np.argsort(-uses, kind="stable")[:_TOP]
    top = top[uses[top] > 0]
    special, vocabulary, ended, unknown = {}, None, None, 0
    stops: list[int] = []
    if tokenizer is not None:
        vocabulary = tokenizer.vocabulary_size
        unknown = int(uses[vocabulary:].sum()) + census.beyond
        named = tokenizer.special_ids()
        special = {
            text: int(uses[number])
            for text, number in named.items()
            if number < len(uses) and uses[number]
        }
        stops = [number for number in tokenizer.stop_ids if number < vocabulary]
        if stops:
            last = {*stops, *tokenizer.closing_ids[-1:]}
            ended = sum(int(ends[number]) for number in last if number < len(ends))
    return TokenUse(
        tokens=store.tokens,
        used=int(np.count_nonzero(uses)),
        vocabulary=vocabulary,
        unknown=unknown,
        top=tuple((int(number), int(uses[number])) for number in top),
        top_texts=tuple(tokenizer.decode([int(number)]) for number in top) if tokenizer else (),
        special=special,
        ended=ended,
        stops=tuple(tokenizer.decode([number]) for number in stops) if tokenizer else (),
        completions=store.completions,
        compared=census.compared,
        same_start=census.same_start,
        common=census.common,
    )


BATCH = 8
"""Groups per padded batch in the comparison."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Tokens that padded rows compute, and that the shared layout computes.

    Attributes:
        rows: Tokens of all rows without padding, one row per completion with its prompt.
        prompts: Prompt tokens among them.
        shared: Tokens of the shared layout, with each prompt once.
        in_order: Tokens of padded batches of 8 groups in the order of the store; every row of a
            batch is as long as its longest.
        in_length_order: The same for groups sorted by their longest row.
    """

    rows: int
    prompts: int
    shared: int
    in_order: int
    in_length_order: int

    @property
    def prompt_share(self) -> float:
        """Share of the rows' tokens that belong to prompts."""
        return self.prompts / self.rows

    @property
    def saved(self) -> float:
        """Share of the rows' tokens that the shared layout saves."""
        return 1 - self.shared / self.rows

    @property
    def waste(self) -> float:
        """Share of padding in batches in the order of the store."""
        return 1 - self.rows / self.in_order

    @property
    def sorted_waste(self) -> float:
        """Share of padding in batches sorted by length."""
        return 1 - self.rows / self.in_length_order

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        shares = ("prompt_share", "saved", "waste", "sorted_waste")
        return asdict(self) | {name: getattr(self, name) for name in shares}


def padding(columns: Columns) -> Padding | None:
    """Count the tokens that each layout computes; None for an empty store."""
    if not columns.groups:
        return None
    sizes, longest = columns.sizes, columns.longest()
    prompts = int(sizes @ columns.prompts.astype(np.int64))
    answers = int(columns.completions.sum(dtype=np.int64))
    in_order = _padded(longest, sizes)
    if (sizes == sizes[0]).all():
        longest.sort()
    else:
        order = np.argsort(longest, kind="stable")
        longest, sizes = longest[order], sizes[order]
    return Padding(
        rows=prompts + answers,
        prompts=prompts,
        shared=int(columns.prompts.sum(dtype=np.int64)) + answers,
        in_order=in_order,
        in_length_order=_padded(longest, sizes),
    )


def _padded(longest: NDArray[np.int64], sizes: NDArray[np.int64]) -> int:
    """Count the tokens of padded batches of consecutive groups."""
    starts = np.arange(0, len(longest), BATCH)
    widest, rows = np.maximum.reduceat(longest, starts), np.add.reduceat(sizes, starts)
    return int(widest @ rows)


UPDATE = 32
"""Groups per update; the default of `train`."""

BUDGET = 2048
"""Tokens of a micro-batch; the default of `train` on a CPU."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Tokens computed if common prefixes of sequences are computed once.

    A sequence is a prompt with one of its completions. Groups share a prefix if their prompts agree
    in the first 8 tokens. All numbers are exact counts of distinct prefixes.

    Attributes:
        grouped: Each prompt once per group: the tokens without `--share-beginnings`.
        alone: Common prefixes within each group once, without sharing across groups.
        micro_batches: The tokens of `train --share-beginnings`, which puts groups with a common
            prefix into one micro-batch, for updates of 32 groups of similar length (epoch 0, seed
            0) and micro-batches of 2,048 tokens.
        updates: The minimum for these updates with micro-batches of any size.
        one_pass: The tokens of `precompute --share-beginnings` in micro-batches of 2,048 tokens.
        whole: The minimum for the data: all of it as one tree.
    """

    grouped: int
    alone: int
    micro_batches: int
    updates: int
    one_pass: int
    whole: int

    def saved(self, name: str) -> float:
        """Return the share of the `grouped` tokens that another count saves."""
        tokens: int = getattr(self, name)
        return 1 - tokens / self.grouped

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        names = ("alone", "micro_batches", "updates", "one_pass", "whole")
        return asdict(self) | {f"saved_{name}": self.saved(name) for name in names}


def sharing(store: Store) -> Sharing | None:
    """Count the savings of shared beginnings; None for an empty store.

    Needs about 100 bytes per completion, and 10 to 20 seconds of one core per million pairs.
    """
    if not len(store):
        return None
    groups = np.arange(len(store))
    in_order = store.tree_order(groups)
    plan = store.plan(
        order="length_grouped", groups_per_update=UPDATE, token_budget=BUDGET, layout="tree"
    )
    updates = plan.micro_offsets[plan.update_offsets]

    def tokens(order: np.ndarray, offsets: np.ndarray) -> int:
        return int(store.tree_tokens(order, offsets).sum())

    return Sharing(
        grouped=store.tokens,
        alone=tokens(groups, np.arange(len(store) + 1)),
        micro_batches=tokens(plan.order, plan.micro_offsets),
        updates=tokens(plan.order, updates),
        one_pass=tokens(in_order, store.tree_cuts(in_order, BUDGET)),
        whole=tokens(in_order, np.array([0, len(store)])),
    )


@dataclass(frozen=True, slots=True)
class BatchSharing:
    """Tokens of given batches with and without shared beginnings.

    Attributes:
        together: Tokens that are computed with the tree layout.
        alone: Tokens that are computed with each prompt once per group.
    """

    together: int
    alone: int

    @classmethod
    def of(cls, store: Store, groups: np.ndarray, offsets: np.ndarray) -> "BatchSharing":
        """Count the tokens of batches.

        Args:
            store: The store.
            groups: The groups in the order of the batches, int64 `[G]`.
            offsets: Where each batch begins in `groups`, and the end, int64 `[B + 1]`.
        """
        alone = store.shared_lengths()[groups].sum(dtype=np.int64)
        return cls(int(store.tree_tokens(groups, offsets).sum()), int(alone))

    @classmethod
    def of_pass(cls, store: Store, groups: np.ndarray, token_budget: int) -> "BatchSharing":
        """Count the tokens of a pass over groups, int64 `[G]`, that may order them freely."""
        order = store.tree_order(groups)
        return cls.of(store, order, store.tree_cuts(order, token_budget))

    def to_text(self) -> str:
        """Return the counts and the saving as text."""
        saved = 1 - self.together / max(self.alone, 1)
        return (
            f"shared beginnings: {self.together:,} tokens instead of {self.alone:,} "
            f"({100 * saved:.1f} % saved)"
        )
