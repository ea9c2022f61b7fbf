"""Which tokens the data uses, what padding costs, and what sharing beginnings saves."""

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
    """Counts over all tokens, each prompt once.

    Attributes:
        tokens: All of them.
        used: Distinct ids.
        vocabulary: Ids that the tokenizer has; None where none was given.
        unknown: Tokens whose id the tokenizer does not have; 0 where none was given.
        top: The ids used most, as (id, count).
        top_texts: What these ids are, in the same order; empty without a tokenizer.
        special: How often each special token stands in the data: those that do.
        ended: Completions that end with one of the tokenizer's stop tokens, or as the chat
            template ends an answer, where white space follows that token; None without any.
        stops: These tokens, as text.
        completions: All of them.
        compared: Groups of two completions or more.
        same_start: Of these, groups whose completions all begin with one token.
        common: Tokens that all completions of a compared group begin with, added up.
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
    """Count the tokens of a store, one pass over all of them.

    Args:
        store: Any.
        tokenizer: The one that made it: names ids, and says how many there are.
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
"""Groups in the batches that are imagined."""


@dataclass(frozen=True, slots=True)
class Padding:
    """Tokens computed by rows of prompt and completion, and by sharing the prompt.

    Attributes:
        rows: Tokens of all rows, one a completion, its prompt in each: what is there to compute.
        prompts: Of these, tokens of prompts.
        shared: Tokens where each prompt stands once: what the shared layout computes.
        in_order: Tokens of padded batches of 8 groups in the order of the store; every row of a
            batch is as long as its longest.
        in_length_order: The same, groups sorted by their longest row.
    """

    rows: int
    prompts: int
    shared: int
    in_order: int
    in_length_order: int

    @property
    def prompt_share(self) -> float:
        """Share of the rows' tokens that are prompt."""
        return self.prompts / self.rows

    @property
    def saved(self) -> float:
        """Share of the rows' tokens that sharing the prompt does not compute."""
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
    """Count what layouts compute; None for an empty store."""
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
    """Count the tokens of batches of consecutive groups, whose rows are as long as the longest."""
    starts = np.arange(0, len(longest), BATCH)
    widest, rows = np.maximum.reduceat(longest, starts), np.add.reduceat(sizes, starts)
    return int(widest @ rows)


UPDATE = 32
"""Groups of an update, as `train` has them by default."""

BUDGET = 2048
"""Tokens of a micro-batch, likewise on a CPU."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Tokens computed where each beginning that sequences share is computed once.

    A sequence is a prompt with one of its completions. Groups share where their prompts agree in
    their first 8 tokens. All numbers are exact counts of distinct beginnings.

    Attributes:
        grouped: Each prompt once a group: what is computed without `--share-beginnings`.
        alone: What the sequences of a group begin with alike once, groups apart.
        micro_batches: Groups of an update that begin alike in one micro-batch: what
            `train --share-beginnings` computes with updates of 32 groups of similar length (epoch
            0, seed 0) and micro-batches of 2,048 tokens.
        updates: The least for these updates, whatever the micro-batches.
        one_pass: What `precompute --share-beginnings` computes in micro-batches of 2,048 tokens.
        whole: The least for the data: all of it as one tree.
    """

    grouped: int
    alone: int
    micro_batches: int
    updates: int
    one_pass: int
    whole: int

    def saved(self, name: str) -> float:
        """Return which share of the grouped tokens one of the other counts saves."""
        tokens: int = getattr(self, name)
        return 1 - tokens / self.grouped

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        names = ("alone", "micro_batches", "updates", "one_pass", "whole")
        return asdict(self) | {f"saved_{name}": self.saved(name) for name in names}


def sharing(store: Store) -> Sharing | None:
    """Count what sharing beginnings saves; None for an empty store.

    Takes about 100 bytes a completion, and 10 to 20 seconds of one core a million pairs.
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
